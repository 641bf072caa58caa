"""Score the responses of --prompt-data once, for runs with --teacher-placement file:

    torchrun --nproc-per-node N -m megatron_tropd.score_responses --teacher-scores DIR --objective kd [flags of the run]

Takes the flags of the training command; of the models only the teacher is loaded, in its own layout.  What an earlier
launch scored is kept.  Exit codes of a rank: 0 done, 1 failed or ended from outside, 2 the configuration or a file that
it names cannot be used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_tropd.parallel.job_end import EXIT_FAILED, End, JobEnd, describe
from megatron_tropd.standard_streams import tell


def _end_of(error: BaseException) -> End:
    exit_code = getattr(error, "exit_code", None)
    if exit_code is not None:
        return End(text=str(error), exit_code=exit_code, summary=type(error).__name__)
    text = f"{describe(error)}\nWhat was scored is kept: run the same command again to go on."
    return End(text=text, exit_code=EXIT_FAILED, summary=type(error).__name__)


def _score(argv: Sequence[str]) -> int:
    """Score what ``argv`` describes.  Imports are here because they take seconds."""
    from megatron_tropd.cli import ConfigError, parse
    from megatron_tropd.parallel import platform

    config = parse(argv)
    platform.install()  # before the first import of Megatron

    from megatron_tropd.parallel.fail_together import is_rank_zero
    from megatron_tropd.parallel.groups import init_distributed, shutdown
    from megatron_tropd.setup.response_scores import Progress, score_responses
    from megatron_tropd.setup.run_spec import make_run_spec

    directory = config.teacher.teacher_scores
    if config.teachers:
        raise ConfigError(["--teacher-config: one teacher at a time scores; give the flags of one"])
    if not directory:
        raise ConfigError(["--teacher-scores DIR is missing: where to write the scores"])
    colocated = replace(config.teacher, teacher_placement="colocated", teacher_scores="", teacher_world_size=0)
    spec = make_run_spec(replace(config, teacher=colocated), int(os.environ.get("WORLD_SIZE", "1")))
    if not spec.objective.needs.teacher or spec.objective.needs.rollouts:
        raise ConfigError(
            [
                f"--objective {config.objective.objective} does not learn from a teacher on the responses of the data; "
                "give that of the run which will read the scores, such as kd"
            ]
        )

    def say(progress: Progress) -> None:
        earlier = f" ({progress.skipped} by an earlier launch)" if progress.skipped else ""
        if is_rank_zero():
            tell(f"scored {progress.done} of {progress.total} responses{earlier}")

    init_distributed(spec.config.parallel.distributed_timeout_s)
    score_responses(spec, Path(directory), say)
    shutdown()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return JobEnd(_end_of).run(lambda: _score(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
