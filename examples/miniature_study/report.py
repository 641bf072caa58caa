"""Write docs/miniature_study.md and its figures from the results of run.py.

    python examples/miniature_study/report.py --readme README.md

The same results give the same bytes.  What is missing in the results is named in the page.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.atomic_files import write_text  # noqa: E402
from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.study.claims import MAIN  # noqa: E402
from tools.study.comparisons import ENTROPY, GRAD_NORM, Table  # noqa: E402
from tools.study.figures import draw_curves  # noqa: E402
from tools.study.page import page  # noqa: E402
from tools.study.readme_table import NoPlace, with_table  # noqa: E402
from tools.study.results import Result, ResultsError, read  # noqa: E402


def write(results: Sequence[Result], page_file: Path, images: Path) -> None:
    """Write the page and the figures that it shows.

    Raises:
        OSError: a file cannot be written.
    """
    table = Table(results)
    images.mkdir(parents=True, exist_ok=True)
    page_file.parent.mkdir(parents=True, exist_ok=True)
    figures = {}
    for condition in MAIN:
        for quantity in (ENTROPY, GRAD_NORM):
            if path := draw_curves(table, condition, quantity, images):
                figures[condition, quantity] = Path(os.path.relpath(path, page_file.parent)).as_posix()
    page_file.write_text(page(results, figures), encoding="utf-8")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    flags = FlagParser(description=(__doc__ or "").split("\n\n")[0])
    flags.add_argument("--results", type=Path, default=ROOT / "examples/miniature_study/results.jsonl")
    flags.add_argument("--page", type=Path, default=ROOT / "docs/miniature_study.md")
    flags.add_argument("--images", type=Path, default=ROOT / "docs/images")
    flags.add_argument("--readme", type=Path, help="also write the short table between its marks in this file")
    args = flags.parse_args(words)
    try:
        results = read(args.results)
    except (OSError, ResultsError) as error:
        print(f"report.py: --results cannot be used: {error}", file=sys.stderr)
        return 2
    try:
        write(results, args.page, args.images)
        if args.readme:
            write_text(args.readme, with_table(args.readme.read_text(encoding="utf-8"), results))
    except NoPlace as error:
        print(f"report.py: --readme {args.readme}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: --page, --images or --readme cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"{args.page}: {len(results)} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
