"""Write responses of a model to prompts:

    python -m megatron_tropd.generate --hf-checkpoint TEACHER --prompt-data FILE --save DIR [flags]

DIR/data is then what ``--prompt-data`` of a training run takes.  A command that was ended in any way goes on when it is
given again.  Exit codes: 0 done, 1 failed or ended from outside, 2 the flags or a file that they name cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_tropd.parallel.job_end import EXIT_FAILED, End, JobEnd, describe


def _end_of(error: BaseException) -> End:
    exit_code = getattr(error, "exit_code", None)
    if exit_code is not None:
        return End(text=str(error), exit_code=exit_code, summary=type(error).__name__)
    text = f"{describe(error)}\nWhat was written is kept: give the same command again to go on."
    return End(text=text, exit_code=EXIT_FAILED, summary=type(error).__name__)


def _generate(argv: Sequence[str]) -> int:
    """Do what ``argv`` describes.  Imports are here because they take seconds."""
    from megatron_tropd.generation.flags import parse_flags

    flags = parse_flags(argv)

    from megatron_tropd.generation.job import prepare
    from megatron_tropd.generation.run import run

    run(prepare(flags))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return JobEnd(_end_of).run(lambda: _generate(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
