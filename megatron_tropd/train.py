"""Train a student: ``torchrun --nproc-per-node N -m megatron_tropd.train --config X.yaml [flags]``.

Exit codes of a rank: 0 done, 1 failed while running, 2 the configuration cannot be used, 17 a loss or gradient
norm was not finite.  If a rank fails, torchrun itself exits with 1 and prints the rank's code.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from megatron_tropd.parallel import platform

platform.install()  # before the first import of Megatron

import torch.distributed as dist  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from megatron_tropd.cli import ConfigError, parse  # noqa: E402
from megatron_tropd.config import TrainConfig  # noqa: E402
from megatron_tropd.parallel.groups import init_distributed, shutdown  # noqa: E402
from megatron_tropd.setup.assemble import Assembled, assemble, close  # noqa: E402
from megatron_tropd.setup.run_spec import RunSpec, make_run_spec  # noqa: E402
from megatron_tropd.training.checkpointing import resume_origin  # noqa: E402
from megatron_tropd.training.finish import write_results  # noqa: E402
from megatron_tropd.training.guard import EXIT_NONFINITE, NonFiniteStep  # noqa: E402
from megatron_tropd.training.loop import train  # noqa: E402

EXIT_BAD_CONFIG = 2


class Terminated(BaseException):
    """SIGTERM arrived: torchrun ends the job because another rank failed, or the machine is being taken away.

    Not an Exception: code that handles any Exception and goes on, as fail_together does, must not handle this one.
    """


def _on_terminate(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated("ended by SIGTERM")


def _say(text: str) -> None:
    """Print to standard error on one rank of each node, because a path may be missing on only some of the nodes."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def _lost(error: BaseException, config: TrainConfig) -> str:
    """Return the message for a rank that fails during the run: the error, and how to continue."""
    what = f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}\nThe job ends; "
    interval = config.checkpoint.save_interval
    try:
        saved = resume_origin(config) is not None
    except ValueError:  # a damaged tracker; the next launch reports it
        saved = True
    if not saved:
        return what + (
            f"there is no checkpoint to go on from (--save-interval {interval}): start over with another --run-dir, "
            f"or delete {config.logging.run_dir}."
        )
    return what + (
        "no weight of an unfinished step was saved.  Run the same command again: it resumes from the "
        f"last checkpoint in {config.save_dir} (--save-interval {interval})."
    )


def _run(spec: RunSpec) -> None:
    init_distributed(timeout_s=spec.config.parallel.distributed_timeout_s)
    assembled: Assembled = assemble(spec)
    try:
        for note in spec.data.notes:
            assembled.run.progress.message(note)
        for warning in spec.warnings:
            assembled.run.progress.message(f"warning: {warning}")
        with assembled.run.progress:
            train(assembled.run, assembled.start_step)
        student = spec.models.student
        write_results(assembled.run, student.arch, student.hf_dir)
    finally:
        close(assembled)
    dist.barrier()
    shutdown()


@record
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        spec = make_run_spec(config, int(os.environ.get("WORLD_SIZE", "1")))
    except ConfigError as error:
        _say(str(error))
        return EXIT_BAD_CONFIG
    signal.signal(signal.SIGTERM, _on_terminate)  # so that each rank still running prints how to continue
    try:
        _run(spec)
    except ConfigError as error:  # another run holds the run directory, or it cannot be written
        _say(str(error))
        return EXIT_BAD_CONFIG
    except NonFiniteStep as error:
        _say(str(error))
        return EXIT_NONFINITE
    except (Exception, Terminated) as error:
        print(_lost(error, config), file=sys.stderr, flush=True)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
