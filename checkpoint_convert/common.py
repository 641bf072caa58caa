"""Code that the commands share: flags, checks of them, launch and errors."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.hub import Resolved
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.fail_together import RankFailure, from_all_ranks
from megatron_tropd.parallel.job_end import EXIT_FAILED, End, JobEnd, Terminated, describe, is_consequence
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.print_once import Importance, print_once
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam, stored_params
from megatron_tropd.weights.files.other_tensors import listed

USAGE_ERROR = 2


DEFAULT_BUFFER_MIB = 64


class FlagError(ValueError):
    """The command line cannot be parsed; the message begins with the usage."""


class Parser(FlagParser):
    """An ArgumentParser whose errors and help are printed on one rank of a node: errors are raised, for :func:`run`."""

    def error(self, message: str) -> NoReturn:
        """Raise the error that argparse would print."""
        raise FlagError(f"{self.format_usage()}{self.prog}: error: {message}")

    def print_help(self, file: Any = None) -> None:
        """Print the help on one rank of a node."""
        print_once(self.format_help().rstrip(), Importance.CAUSE, file or sys.stdout)


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's flags for the sizes of a layout.  They only set where chunks are cut: any layout reads any
    checkpoint, and with chunks cut for it, each rank reads only its own bytes."""
    for name, letter in (("tensor-model", "N"), ("pipeline-model", "M"), ("expert-model", "E"), ("expert-tensor", "T")):
        default = "that of --tensor-model-parallel-size" if name == "expert-tensor" else "1"
        parser.add_argument(
            f"--{name}-parallel-size", type=int, default=None if name == "expert-tensor" else 1, metavar=letter,
            help=f"default {default}",
        )  # fmt: skip


def add_stream_flags(parser: argparse.ArgumentParser) -> None:
    """Add --buffer-mib and --verify."""
    parser.add_argument(
        "--buffer-mib", type=int, default=DEFAULT_BUFFER_MIB, metavar="MIB",
        help=f"largest piece held at a time; peak memory is one to three of them per process ({DEFAULT_BUFFER_MIB})",
    )  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="read what was written again and compare every hash")


def add_logits_flag(parser: argparse.ArgumentParser) -> None:
    """Add --verify-logits, the check that loads whole models."""
    parser.add_argument(
        "--verify-logits", action="store_true",
        help="build both models and compare logits in fp32 (one process; needs memory for two fp32 models)",
    )  # fmt: skip


def check_logits_flag(args: argparse.Namespace, processes: int) -> None:
    """Refuse --verify-logits under torchrun.

    Raises:
        ValueError: --verify-logits is given and there are several processes.
    """
    if args.verify_logits and processes > 1:
        raise ValueError(f"--verify-logits runs in one process, torchrun started {processes}; start without torchrun")


def buffer_bytes(args: argparse.Namespace) -> int:
    """Return the value of --buffer-mib in bytes.

    Raises:
        ValueError: it is less than 1.
    """
    if args.buffer_mib < 1:
        raise ValueError(f"--buffer-mib {args.buffer_mib} must be at least 1")
    return args.buffer_mib << 20


def add_save_flags(parser: argparse.ArgumentParser) -> None:
    """Add --save and --overwrite."""
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument("--overwrite", action="store_true", help="write into a --save that holds files")


def check_output(save: Path, *, overwrite: bool, sources: Sequence[Path]) -> None:
    """Refuse an output directory that holds files (without ``overwrite``) or that overlaps a source.

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


def check_same_source(model: Resolved) -> None:
    """Compare the commit that each rank found for a model of the Hub.  Collective.

    Raises:
        ValueError: on every rank: they differ.
    """
    if len(found := set(from_all_ranks(lambda: model.source))) > 1:
        raise ValueError(
            f"--hf-checkpoint is {' and '.join(sorted(found))} on different ranks; give the commit: owner/name@commit"
        )


def check_layout(args: argparse.Namespace, arch: Architecture) -> None:
    """Refuse a layout into which the model cannot be split.

    Raises:
        ValueError: names the flags to change.
    """
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    ParallelLayout.for_world(tp * pp if min(tp, pp) > 0 else 1, tp, pp)
    ep, etp = args.expert_model_parallel_size, args.expert_tensor_parallel_size
    if ep < 1 or (etp is not None and etp < 1):
        raise ValueError(
            f"--expert-model-parallel-size {ep} and --expert-tensor-parallel-size {etp} must both be at least 1"
        )
    if errors := arch.check_layout(tp, pp, ep=ep, etp=etp):
        raise ValueError("; ".join(errors))


def target_params(args: argparse.Namespace, arch: Architecture, divisor: int) -> tuple[StoredParam, ...]:
    """Return the parameters of the model, padded to ``divisor`` and with chunks cut for the layout of the flags."""
    tp, etp = args.tensor_model_parallel_size, args.expert_tensor_parallel_size
    return stored_params(arch, ParallelLayout(tp=tp, etp=etp, make_vocab_size_divisible_by=divisor))


def iteration(text: str | None) -> int | Literal["release"] | None:
    """Return the value of --iteration.

    Raises:
        ValueError: it is neither a number nor ``release``.
    """
    if text is None:
        return None
    if text == "release":
        return "release"
    if not text.isdecimal():
        raise ValueError(f"--iteration {text} is neither a number nor 'release'")
    return int(text)


def notes(arch: Architecture, left_aside: Iterable[str]) -> list[str]:
    """Return lines about what a user of a converted checkpoint has to know."""
    lines = []
    if names := list(left_aside):
        lines.append(f"left aside     {len(names)} tensors, also when it is converted back: {listed(names)}")
    if arch.attention_window and arch.attention_window < arch.max_position_embeddings:
        lines.append(f"lengths        sequences of at most {arch.attention_window} tokens (sliding_window)")
    return lines


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def gigabytes(count: int) -> str:
    """Return a number of bytes as text, such as ``1.25 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


def prepare() -> None:
    """Prepare for the first import of Megatron: patch it for machines without CUDA, and silence its warnings about
    packages that are not installed."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    platform.install()


def _end_of(error: BaseException) -> End:
    """Return what to print for an error that ends a command."""
    summary = type(error).__name__
    if isinstance(error, FlagError):
        return End(text=str(error), exit_code=USAGE_ERROR, summary=summary)
    if isinstance(error, (ValueError, OSError, RankFailure)):
        exit_code = getattr(error, "exit_code", USAGE_ERROR)
        return End(text=f"error: {error}", exit_code=exit_code, summary=summary)
    text = describe(error)
    if is_consequence(error):
        text += "\nThe command ends without a result.  Run it again, with --overwrite if --save holds files."
    return End(text=text, exit_code=EXIT_FAILED, summary=summary)


def run(command: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.  An error that a user can fix gives status 2 and a message on standard
    error, once on each node and without a traceback."""

    def run_here() -> int:
        prepare()
        try:
            command(argv)
        except (Exception, Terminated) as error:
            job_end.report(error)  # before other ranks see this one leave the job
            raise
        finally:
            if dist.is_initialized():
                from megatron_tropd.parallel.groups import shutdown

                shutdown()
        return 0

    job_end = JobEnd(_end_of)
    return job_end.run(run_here)
