r"""Compare runs on one HTML page: their curves in one plot, the flags in which they differ, and their final scores.

    python tools/compare_runs.py runs/opd runs/tropd --output compare.html
    python tools/compare_runs.py runs/opd runs/tropd --benchmark opd=results/opd --benchmark tropd=results/tropd

Differences are from the first run.  ``docs/results.md`` says what is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.atomic_files import write_text  # noqa: E402
from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.results.compare_input import load  # noqa: E402
from tools.results.compare_page import comparison_page  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    p = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run directory, or one with run/ and benchmark/")
    p.add_argument("--names", nargs="+", help="what the runs are called (default: names of their directories)")
    p.add_argument(
        "--benchmark", action="append", default=[], metavar="NAME=DIR",
        help="the --output of the benchmark command for a run; not needed where it is benchmark/ beside run/",
    )  # fmt: skip
    p.add_argument("--output", type=Path, default=Path("compare.html"), help="(default: compare.html)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 where the page cannot be written, 2 for runs that cannot be compared."""
    args = parser().parse_args(argv)
    try:
        runs = load(args.runs, args.names, args.benchmark)
    except (OSError, ValueError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    for problem in (problem for named in runs for problem in named.run.problems):
        print(f"compare_runs: {problem}", file=sys.stderr)
    try:
        write_text(args.output, comparison_page(runs))
    except OSError as error:
        print(f"compare_runs: --output {args.output} cannot be written: {error}", file=sys.stderr)
        return 1
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
