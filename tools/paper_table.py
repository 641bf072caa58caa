"""Train and evaluate all rows of one of the paper's tables: what ``examples/paper/run_table.sh`` runs.

    bash examples/paper/run_table.sh 1 --out runs/paper --benchmark-data benchmark_data --seeds 1 2 3
    bash examples/paper/run_table.sh 1 --out runs/smoke --smoke

The same command again goes on: what is done is skipped.  A row that fails does not end the others.  Flags after ``--``
are the trainer's.  Exit codes: 0 all rows are done, 1 some are not, 2 the command or a recipe cannot be used.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.cli import ConfigError  # noqa: E402
from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.paper.recipes import PAPER, Place, RecipeError, Tables, read_tables  # noqa: E402
from tools.paper.table_run import EXIT_FAILED, EXIT_USAGE, Options, Outcome, TableRun  # noqa: E402


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = list(sys.argv[1:] if words is None else words)
    end = given.index("--") if "--" in given else len(given)  # argparse cannot tell a flag's value from the trainer's
    args, trainer_flags = _parser().parse_args(given[:end]), tuple(given[end + 1 :])
    tables = read_tables()
    try:
        places = _places(tables, args)
        table = TableRun(tables=tables, options=_options(args, trainer_flags))
        signal.signal(signal.SIGTERM, _interrupt)
        return _run(table, places)
    except (RecipeError, ConfigError) as error:
        print(f"paper_table: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("paper_table: interrupted; the same command goes on", file=sys.stderr)
        return EXIT_FAILED


def _run(table: TableRun, places: Sequence[Place]) -> int:
    outcomes: list[Outcome] = []
    for outcome in table.run(places):
        outcomes.append(outcome)
        print(_line(outcome), flush=True)
    failed = [outcome for outcome in outcomes if not outcome.done]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} rows are done")
    for outcome in failed:
        print(_line(outcome))
    return EXIT_FAILED if failed else 0


def _line(outcome: Outcome) -> str:
    place = outcome.place
    name = f"{place.table} {place.setting.name} {place.row.name} seed {outcome.seed}"
    return f"[{'ok' if outcome.done else 'FAILED'}] {name}: {outcome.what} ({outcome.seconds:.0f} s)"


def _places(tables: Tables, args: argparse.Namespace) -> list[Place]:
    table = f"table{args.table}" if args.table.isdecimal() else args.table
    places = tables.of(table, readings=args.readings)
    for flag, given, known in (
        ("--rows", args.rows, [place.row.name for place in places]),
        ("--settings", args.settings, [place.setting.name for place in places]),
    ):
        if unknown := [name for name in given if name not in known]:
            names = ", ".join(dict.fromkeys(known))
            raise RecipeError(f"{flag} {' '.join(unknown)}: {table} has {names} (--readings adds more rows)")
    return [
        place for place in places
        if place.row.name in (args.rows or [place.row.name])
        and place.setting.name in (args.settings or [place.setting.name])
    ]  # fmt: skip


def _options(args: argparse.Namespace, trainer_flags: tuple[str, ...]) -> Options:
    smoke = args.smoke or bool(os.environ.get("SMOKE"))
    benchmark: tuple[str, ...] | None = None
    if not smoke and not args.no_benchmark:
        if args.benchmark_data is None:
            raise RecipeError(
                "--benchmark-data is missing: name the folder of docs/benchmarks.md, or give --no-benchmark"
            )
        benchmark = ("--data-dir", str(args.benchmark_data), *shlex.split(args.benchmark_flags))
    world = Path(os.environ.get("SMALL_WORLD") or ROOT / "runs" / "small_world_0")
    return Options(
        out=args.out, seeds=tuple(args.seeds), launch=tuple(shlex.split(args.launch)),
        small_world=world if smoke else None, benchmark=benchmark, trainer_flags=trainer_flags,
    )  # fmt: skip


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = FlagParser(
        prog="run_table.sh",
        usage="run_table.sh TABLE --out DIR [flags] [-- flags of the trainer]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", help="1, 3, 4, 5 or 6; Table 2 has no results")
    parser.add_argument("--out", type=Path, required=True, help="rows go to OUT/TABLE/SETTING/ROW/seed-N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], metavar="N", help="(default: 1)")
    parser.add_argument("--settings", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--rows", nargs="+", default=[], metavar="NAME", help="only these (default: all that are printed)"
    )
    parser.add_argument("--readings", action="store_true", help="also other readings of what the paper leaves open")
    parser.add_argument("--smoke", action="store_true", help="tiny models on CPUs, two steps; or SMOKE=1")
    launch = f"bash {shlex.quote(str(PAPER / 'train.sh'))}"
    parser.add_argument("--launch", default=launch, metavar="WORDS", help=(
        "what trains a row and waits, as 'sbatch --wait examples/paper/row.sbatch' (default: train.sh)"))  # fmt: skip
    parser.add_argument("--no-benchmark", action="store_true", help="train only")
    parser.add_argument("--benchmark-data", type=Path, metavar="DIR", help="--data-dir of the benchmarks")
    parser.add_argument("--benchmark-flags", default="--num-servers 8", metavar="WORDS",
                        help="more flags of python -m megatron_tropd.benchmark (default: %(default)s)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
