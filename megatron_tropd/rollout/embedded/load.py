"""An embedded engine with the weights of a checkpoint, for commands without a trainer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch

from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of weights and KV cache, by the value of --dtype."""


def check_device(device: str) -> None:
    """Raise ValueError if torch has no device of this name here; for --device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # not a device's name; torch has no such device here
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from None


def load_engine(
    directory: Path, *, stop_token_ids: Collection[int], device: str, dtype: str | None, max_batch_size: int
) -> EmbeddedEngine:
    """Return an engine that holds the weights of an HF checkpoint.

    Args:
        directory: with config.json and weights.
        stop_token_ids: a response ends with any of them.
        device: where the weights live.
        dtype: a name of ``DTYPES``; None for float32 on a CPU and the checkpoint's own elsewhere.
        max_batch_size: sequences decoded at once.

    Raises:
        OSError, ValueError: a file or a setting cannot be used.
        EngineError: the checkpoint's tensors are not those of its architecture.
    """
    checkpoint = HfCheckpoint.open(directory)
    on_cpu = torch.device(device).type == "cpu"
    engine = EmbeddedEngine(
        directory,
        stop_token_ids=stop_token_ids,
        dtype=DTYPES[dtype] if dtype else torch.float32 if on_cpu else checkpoint.widest_dtype,
        device=device,
        max_batch_size=max_batch_size,
    )
    engine.begin_update(0)
    engine.update((name, checkpoint.read(name)) for name in checkpoint.tensors)
    engine.end_update(0)
    return engine
