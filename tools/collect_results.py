r"""Make the paper's tables, Figure 1 and Figure 3 from the runs and benchmarks of a directory of rows.

    python tools/collect_results.py results/                     # every table below it, as text
    python tools/collect_results.py results/table1 --save page/  # and as results.md, results.csv, figures/

``docs/results.md`` says how the directory looks and what is counted.  What was not run is shown as not run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.results.collect import Results, save, text  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    p = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("directory", type=Path, help="OUT, OUT/TABLE or OUT/TABLE/SETTING, with ROW/row.json below it")
    p.add_argument("--save", type=Path, metavar="DIR", help="write results.md, results.csv and figures/ there")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 where results cannot be written, 2 for a directory that cannot be used."""
    args = parser().parse_args(argv)
    try:
        results = Results.of(args.directory)
    except (OSError, ValueError) as error:
        print(f"collect_results: {error}", file=sys.stderr)
        return 2
    print(text(results))
    for problem in results.problems:
        print(f"collect_results: {problem}", file=sys.stderr)
    if args.save is not None:
        try:
            paths = save(results, args.save)
        except OSError as error:
            print(f"collect_results: --save {args.save} cannot be written: {error}", file=sys.stderr)
            return 1
        print(f"\nwritten: {paths[0]}, {paths[1]} and {len(paths) - 2} figures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
