"""Run the miniature study, or go on with it: every method, in three small worlds, with five seeds, on a CPU.

    python examples/miniature_study/run.py                     # everything
    python examples/miniature_study/run.py --subset            # two seeds of five methods
    python examples/miniature_study/report.py                  # the page and its figures

What is finished is a line of results.jsonl and is not run again; the same command goes on where one ended.  Each run
is one process of ``python -m megatron_tropd.train`` with one thread.  docs/miniature_study.md says what the worlds are.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.study.jobs import ENVIRONMENT  # noqa: E402
from tools.study.methods import METHODS  # noqa: E402
from tools.study.plan import (  # noqa: E402
    HARSH_LR,
    LONG_STEPS,
    LR,
    MAIN_WORLDS,
    SEEDS,
    STEPS,
    WARNING_WORLD,
    Cell,
    full_plan,
    select,
    subset_plan,
)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    flags = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--directory", type=Path, default=Path("runs/miniature_study"), help="default: %(default)s")
    flags.add_argument("--workers", type=int, default=2, help="runs side by side, one core each (default: %(default)s)")
    flags.add_argument("--seeds", type=int, default=SEEDS, help="seeds 0, 1, ... (default: %(default)s)")
    flags.add_argument("--subset", action="store_true", help="about ten minutes on two idle cores")
    flags.add_argument("--warning-world", action="store_true", help=f"also {WARNING_WORLD}, no part of the study")
    flags.add_argument("--worlds", nargs="+", choices=(*MAIN_WORLDS, WARNING_WORLD), default=[], help="only these")
    flags.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=[], metavar="METHOD",
                       help=f"only these of {', '.join(METHODS)}")  # fmt: skip
    flags.add_argument("--lr", nargs="+", type=float, choices=(LR, HARSH_LR), default=[], help="only these")
    flags.add_argument("--steps", nargs="+", type=int, choices=(STEPS, LONG_STEPS), default=[], help="only these")
    flags.add_argument("--keep-runs", action="store_true", help="keep the run directories of finished runs")
    flags.add_argument("--list", action="store_true", help="print the names of the runs, and run nothing")
    args = flags.parse_args(words)
    for name in ("workers", "seeds"):
        if getattr(args, name) < 1:
            flags.error(f"--{name} {getattr(args, name)}: expected at least 1")
    return args


def plan_of(args: argparse.Namespace) -> list[Cell]:
    """The cells that the command line asks for."""
    with_warning = args.warning_world or WARNING_WORLD in args.worlds
    cells = subset_plan() if args.subset else full_plan(args.seeds, warning_world=with_warning)
    return select(cells, worlds=args.worlds, methods=args.methods, lrs=args.lr, steps=args.steps)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = arguments(words)
    cells = plan_of(args)
    if not cells:
        print("run.py: no run of the study has these --worlds, --methods, --lr and --steps together", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(cell.name for cell in cells))
        return 0
    os.environ.update(ENVIRONMENT)  # before torch is imported, and before the first process is started

    from tools.study.driver import Place, StudyError, run_study
    from tools.study.results import ResultsError

    place = Place(root=args.directory.resolve())
    try:
        run_study(cells, place, args.workers, keep_runs=args.keep_runs, say=lambda line: print(line, flush=True))
    except ResultsError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"run.py: --directory {args.directory} cannot be used: {error}", file=sys.stderr)
        return 1
    except StudyError as error:
        print(f"run.py: {error}\nRun the same command again when the cause is removed.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("run.py: interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 1
    print(f"done: {place.results}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
