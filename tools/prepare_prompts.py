r"""Prepare published data as prompts: one form of rows, no duplicates, no questions of benchmarks, a report.

    python tools/prepare_prompts.py --prompt-data open-thoughts/OpenThoughts3-1.2M --domains math --save data/math
    python tools/prepare_prompts.py --prompt-data dapo-math-17k.parquet --require-answer --decontaminate aime24.jsonl \
        --take math=8000 --save data/dapo.jsonl

docs/prompts.md has the forms of data, the steps and their order.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.atomic_files import reason_of  # noqa: E402
from megatron_tropd.data.reading.rows import PromptError  # noqa: E402
from tools.prompt_preparation import report  # noqa: E402
from tools.prompt_preparation.flags import parse  # noqa: E402
from tools.prompt_preparation.preparation import NothingLeft, prepare  # noqa: E402
from tools.prompt_preparation.settings import Settings, UsageError  # noqa: E402

_SECONDS_BETWEEN_LINES = 10.0


class _Progress:
    """Says now and then on stderr how many rows were read."""

    def __init__(self) -> None:
        self.start = self._last = time.monotonic()

    def __call__(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            _say(f"{rows:,} rows read, {rows / (now - self.start):,.0f} a second")


def _say(text: str) -> None:
    print(f"prepare_prompts: {text}", file=sys.stderr, flush=True)


def _run(settings: Settings) -> None:
    progress = _Progress()
    tally, content = prepare(settings, say=_say, progress=progress)
    print(report.table(tally, content))
    print(f"saved {settings.save}")
    seconds = time.monotonic() - progress.start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    _say(f"{seconds:.0f} s, {tally.read / seconds:,.0f} rows a second, at most {peak:.0f} MiB of memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 where the data or the disk is at fault, 2 where the command line is."""
    try:
        settings = parse(sys.argv[1:] if argv is None else argv, __doc__)
    except UsageError as error:
        _say(str(error))
        return 2
    try:
        _run(settings)
    except UsageError as error:
        _say(str(error))
        return 2
    except PromptError as error:
        _say(str(error))
        return 1
    except NothingLeft as error:
        print(error)
        _say("no row is left; nothing was saved")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; nothing was saved")
        return 1
    except OSError as error:
        _say(f"--save {settings.save} cannot be written ({reason_of(error)}); nothing was saved")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
