"""Run the paper's benchmarks on a model, and compare models.

    python -m megatron_tropd.benchmark --hf-checkpoint DIR --data-dir DATA --output OUT
    python -m megatron_tropd.benchmark compare A B       paired difference of two runs
    python -m megatron_tropd.benchmark table DIR...      one table of several runs

evalscope asks the questions, in an environment of its own (``make benchmark-env``); docs/benchmarks.md.  Exit codes: 0
done, 1 failed or interrupted (the same command goes on), 2 a flag or a file cannot be used.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_tropd.benchmarks import flags, tables
from megatron_tropd.benchmarks.compare import compare
from megatron_tropd.benchmarks.job import RunnerFailed
from megatron_tropd.benchmarks.paper_results import PAPER
from megatron_tropd.benchmarks.results import model_name
from megatron_tropd.benchmarks.run import run, say
from megatron_tropd.benchmarks.statistics import NUM_RESAMPLES
from megatron_tropd.errors import EngineError
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.standard_streams import open_closed, print_result

EXIT_FAILED, EXIT_USAGE = 1, 2


def _run(words: Sequence[str]) -> None:
    args, rest = flags.parser().parse_known_args(words)
    run(args, flags.split_server_flags(rest))


def _compare(words: Sequence[str]) -> None:
    parser = FlagParser(
        prog="python -m megatron_tropd.benchmark compare",
        description="Difference of two models over the same questions, by the paired bootstrap.",
    )
    parser.add_argument("first", type=Path, metavar="DIR_A", help="an --output directory")
    parser.add_argument("second", type=Path, metavar="DIR_B")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resamples", type=int, default=NUM_RESAMPLES, help="(default: %(default)s)")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(words)
    found = compare(args.first, args.second, seed=args.seed, num_resamples=args.resamples)
    _print(tables.comparison_table(found, model_name(args.first), model_name(args.second)), args.markdown)


def _table(words: Sequence[str]) -> None:
    parser = FlagParser(
        prog="python -m megatron_tropd.benchmark table", description="One table of several runs, in percent."
    )
    parser.add_argument("outputs", type=Path, nargs="+", metavar="DIR", help="--output directories")
    parser.add_argument(
        "--paper-setting", nargs="*", choices=list(PAPER), default=[], help="print the paper's rows too"
    )
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(words)
    _print(tables.models_table(args.outputs, args.paper_setting), args.markdown)


def _print(table: tables.Table, markdown: bool) -> None:
    print_result(table.markdown() if markdown else table.text())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    open_closed()
    words = list(sys.argv[1:] if argv is None else argv)
    commands = {"compare": _compare, "table": _table}
    command = commands.get(words[0]) if words else None
    try:
        if command:
            command(words[1:])
        else:
            _run(words)
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return getattr(error, "exit_code", EXIT_USAGE)
    except (EngineError, RunnerFailed) as error:
        say(f"error: {error}\nWhat was answered is kept: run the same command again to go on.")
        return EXIT_FAILED
    except KeyboardInterrupt:
        say("interrupted; what was answered is kept: run the same command again to go on")
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
