"""What the three commands share: flags, launch, errors."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.training.agree import RanksDisagree

USAGE_ERROR = 2


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """Megatron's names for the two sizes of a layout."""
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="default 1")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="M", help="default 1")


def add_save_flags(parser: argparse.ArgumentParser) -> None:
    """Where to write."""
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="write into a --save that holds files")


def check_output(save: Path, *, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse to write over something, or into what is being read.

    Raises:
        ValueError: names the flag to change.
    """
    for source in sources:
        here, there = save.resolve(), source.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise ValueError(f"--save {save} and {source} overlap; give --save a directory of its own")
    if save.exists() and not save.is_dir():
        raise ValueError(f"--save {save} is a file; give a directory")
    if save.is_dir() and any(save.iterdir()) and not overwrite:
        raise ValueError(f"--save {save} already holds files; choose another directory or pass --overwrite")


def conversion_layout(args: argparse.Namespace, world_size: int) -> ParallelLayout:
    """The layout to build models in: the one asked for where there are that many ranks, else one rank.

    A torch_dist checkpoint has no layout, so one process may write (or read) it for any.

    Raises:
        ValueError: some other number of ranks.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    asked = ParallelLayout.for_world(tp * pp if min(tp, pp) > 0 else 1, tp, pp)
    if world_size == 1:
        return ParallelLayout()
    if world_size != asked.world_size:
        raise ValueError(
            f"torchrun started {world_size} ranks, but --tensor-model-parallel-size {tp} x "
            f"--pipeline-model-parallel-size {pp} = {tp * pp}; start that many with --nproc-per-node, or one"
        )
    return asked


def iteration(text: str | None) -> int | Literal["release"] | None:
    """The value of --iteration.

    Raises:
        ValueError: neither a number nor ``release``.
    """
    if text is None:
        return None
    if text == "release":
        return "release"
    if not text.isdecimal():
        raise ValueError(f"--iteration {text} is neither a number nor 'release'")
    return int(text)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def gigabytes(count: int) -> str:
    """A size for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def run(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Exit status of a command: what a user can mend is one line on stderr and status 2, no traceback."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    platform.install()
    try:
        command(argv)
    except (ValueError, OSError, RanksDisagree) as error:
        if not dist.is_initialized() or dist.get_rank() == 0:  # the same on every rank: let one speak
            print(f"error: {error}", file=sys.stderr, flush=True)
        return USAGE_ERROR
    finally:
        if dist.is_initialized():
            from megatron_tropd.parallel.groups import shutdown

            shutdown()
    return 0
