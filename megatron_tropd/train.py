"""Train a student: ``torchrun --nproc-per-node N -m megatron_tropd.train --config X.yaml [flags]``.

Exit codes of a rank: 0 done, 1 failed while running or ended from outside, 2 the configuration or a file that it names
cannot be used, 17 a loss or gradient norm was not finite, 18 a number of an update was absurd, 75 stopped and saved
before the last step.  If a rank does not end with 0, torchrun itself exits with 1 and prints the rank's code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from megatron_tropd.parallel.job_end import (
    EXIT_FAILED,
    End,
    JobEnd,
    Terminated,
    describe,
    explains_itself,
    is_consequence,
)
from megatron_tropd.parallel.stop_request import StopRequest

if TYPE_CHECKING:
    from megatron_tropd.config import TrainConfig
    from megatron_tropd.parallel.roles import Job
    from megatron_tropd.setup.run_spec import RunSpec

Built = TypeVar("Built")


class Launch:
    """How far a launch has come, which decides what its end means for the user."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.trains: TrainConfig | None = None
        """The configuration, as soon as steps are made."""

    def end_of(self, error: BaseException) -> End:
        """Return what to print for an error that ends this launch."""
        exit_code = getattr(error, "exit_code", None)
        if exit_code is not None:
            return End(text=str(error), exit_code=exit_code, summary=type(error).__name__)
        what = f"{describe(error)}\nThe job ends"
        if getattr(error, "says_how_to_continue", False):
            what += "."
        elif self.trains is not None:
            what += f"; {_how_to_continue(self.trains)}"
        elif is_consequence(error):
            what += " before its first step.  Run the same command again."
        else:
            what += " before its first step.  Run the same command again when the cause is removed."
        return End(text=what, exit_code=EXIT_FAILED, summary=type(error).__name__)


def _how_to_continue(config: TrainConfig) -> str:
    """Return what was saved of a run that ends early, and what to do."""
    from megatron_tropd.training.checkpointing import resume_origin

    interval = config.checkpoint.save_interval
    try:
        saved = resume_origin(config) is not None
    except ValueError:  # a damaged tracker; the next launch reports it
        saved = True
    if not saved:
        return (
            f"there is no checkpoint to go on from (--save-interval {interval}).  Run the same command again: it "
            "starts over, and moves the log of this launch aside."
        )
    return (
        "no weight of an unfinished step was saved.  Run the same command again: it resumes from the "
        f"last checkpoint in {config.save_dir} (--save-interval {interval})."
    )


def _refusing(build: Callable[[], Built]) -> Built:
    """Call ``build``.  What refuses its input there, as a checkpoint of other prompts is, is a configuration error."""
    from megatron_tropd.cli import ConfigError

    try:
        return build()
    except ValueError as error:
        if isinstance(error, ConfigError) or not explains_itself(error):
            raise
        raise ConfigError([str(error)]) from error


def _train(argv: Sequence[str], launch: Launch, job_end: JobEnd) -> int:
    """Make the run that ``argv`` describes, and return the exit code.

    Imports are here because they take seconds: a signal of that time is reported too, and --help needs few of them.
    """
    from megatron_tropd.cli import parse

    config = parse(argv)

    from megatron_tropd.parallel import determinism, platform

    platform.install()  # before the first import of Megatron
    if config.model.deterministic_mode:
        determinism.make_deterministic()

    import torch.distributed as dist

    from megatron_tropd.parallel.groups import init_distributed, shutdown
    from megatron_tropd.parallel.roles import TRAINER, job_of_environment
    from megatron_tropd.setup.engines import make_keeper
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.setup.teacher_world import make_worker
    from megatron_tropd.setup.watching import serving, watched
    from megatron_tropd.training.stopping import Stopped

    spec = make_run_spec(config, int(os.environ.get("WORLD_SIZE", "1")))
    job = job_of_environment(spec.roles)
    _refusing(lambda: init_distributed(spec.config.parallel.distributed_timeout_s, job))
    keeper = make_keeper(spec)
    request = StopRequest()
    try:
        if job.role.name == TRAINER:
            _run(spec, job, launch, job_end, request)
        else:
            worker = _refusing(lambda: make_worker(spec, job))
            launch.trains = spec.config
            with (
                job_end.saving_first(request, spec.config.checkpoint.grace_period),  # its trainer tells it to end
                watched(spec.config, job, serving(), job_end.report),
            ):
                if why := worker.serve():
                    raise Stopped(f"Stopped by {why}: the trainer, for which this rank scored, has saved and ended.")
        dist.barrier()
    finally:
        if keeper is not None:
            keeper.close()
    shutdown()
    return 0


def _run(spec: RunSpec, job: Job, launch: Launch, job_end: JobEnd, request: StopRequest) -> None:
    """Build the run, train, write the results and close the run's parts; nothing holds a process group afterwards."""
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.watching import watched
    from megatron_tropd.training.finish import write_results
    from megatron_tropd.training.loop import train

    assembled = _refusing(lambda: assemble(spec, request, launched_s=launch.began_s))
    launch.trains = spec.config
    try:
        for note in spec.data.notes:
            assembled.run.progress.message(note)
        for warning in spec.warnings:
            assembled.run.progress.message(f"warning: {warning}")
        progress = assembled.run.progress
        with (
            job_end.saving_first(request, spec.config.checkpoint.grace_period),
            watched(spec.config, job, lambda: progress.activity, job_end.report),
            progress,
        ):
            train(assembled.run, assembled.start_step)
        write_results(assembled.run, spec.models.student.arch, spec.models.student.hf_dir)
    except (Exception, Terminated) as error:
        job_end.report(error)  # before the parts are closed, which takes time and may fail as well
        raise
    finally:
        close(assembled)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    launch = Launch()
    job_end = JobEnd(launch.end_of)
    return job_end.run(lambda: _train(sys.argv[1:] if argv is None else argv, launch, job_end))


if __name__ == "__main__":
    sys.exit(main())
