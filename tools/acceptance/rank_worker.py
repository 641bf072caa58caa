"""A rank of section g, in a process that ``multiprocessing`` starts: what its step gives, for one or two ranks.

Neither torch nor Megatron is imported at the top: torch has to be prepared before Megatron is.  Answers are arrays of
numpy: a tensor in a pipe is a handle of memory that ends with this process.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

TIMEOUT_S = 40.0
CASES = {"TP 2": False, "TP 2 with sequence parallelism": True}
"""Whether sequence parallelism is on, by name; a job of one rank runs the first only, at TP 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of the gradient of one Hugging Face tensor."""

    name: str
    place: tuple[slice, ...]
    values: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What one rank's step gives."""

    loss: float
    grad_norm: float
    teacher_logprobs: npt.NDArray[np.float32]
    """Of all rollouts, one after the other."""
    pieces: tuple[Piece, ...]


def main(rank: int, world_size: int, port: int, tiny: bool, pipe: Connection) -> None:
    """Send {case: Numbers, or the text of an error}, as rank ``rank`` of a job on one device."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "4"),
    )  # fmt: skip
    try:
        pipe.send(_run(rank, world_size, port, tiny))
    except Exception:  # of any kind: the section reports it
        pipe.send({case: traceback.format_exc() for case in CASES})


def _run(rank: int, world_size: int, port: int, tiny: bool) -> dict[str, Any]:
    from megatron_tropd.parallel import platform

    platform.install()
    import torch
    import torch.distributed as dist

    if platform.is_cuda():
        torch.cuda.set_device(0)  # both ranks: the product's own start gives every rank a GPU of its own
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )  # fmt: skip
    from .rank_step import numbers

    found: dict[str, Any] = {}
    for case, sequence_parallel in CASES.items():
        if world_size == 1 and sequence_parallel:
            continue
        try:
            found[case] = numbers(world_size, sequence_parallel, tiny)
        except Exception:  # of any kind: the section reports it
            found[case] = traceback.format_exc()
    return found
