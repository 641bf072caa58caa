"""Write the flags of a setting and a row of the paper's tables as one file for ``--config``.

    python tools/paper_recipe.py --setting skywork-math --row tropd --save recipe.yaml
    python tools/paper_recipe.py --list
    python tools/paper_recipe.py --resolved tests/golden/paper    # after a change of flags that is meant

examples/paper/README.md says what settings and rows are.  ``train.sh`` there calls this and trains.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_tropd.flag_parser import FlagParser  # noqa: E402
from tools.paper.recipes import RecipeError, Tables, as_yaml, read_tables, recipe  # noqa: E402


def main() -> int:
    """Run the command; returns its exit code."""
    args = _arguments()
    tables = read_tables()
    if args.list:
        print(listing(tables))
        return 0
    if args.resolved is not None:
        from tools.paper.resolved import write_resolved  # reads the trainer's flags, which imports torch

        write_resolved(tables, args.resolved)
        return 0
    more = {"prompt-data": args.prompt_data, "hf-checkpoint": args.student, "teacher-hf-checkpoint": args.teacher,
            "eval-data": args.eval_data, "sglang-python": args.sglang_python}  # fmt: skip
    try:
        flags = recipe(
            tables, args.setting, args.row, args.small_world, {name: value for name, value in more.items() if value}
        )
        args.save.parent.mkdir(parents=True, exist_ok=True)
        made = f"{args.setting}{f', row {args.row}' if args.row else ''}{', smoke' if args.small_world else ''}"
        args.save.write_text(as_yaml(flags, [f"{made}: written by tools/paper_recipe.py"]), encoding="utf-8")
    except RecipeError as error:
        print(f"paper_recipe: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"paper_recipe: --save {args.save} cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


def listing(tables: Tables) -> str:
    """Return the settings, and the rows with their flags and the tables in which they stand."""
    lines = ["settings: " + ", ".join(tables.settings), "rows:"]
    for row in tables.rows.values():
        where = list(dict.fromkeys(p.table for p in tables.printed if p.row.name in (row.name, row.reading_of)))
        flags = " ".join(f"--{name} {value}" for name, value in row.flags.items())
        what = f"the {row.evaluates}, not trained" if row.evaluates else flags
        other = f"; another reading of {row.reading_of}: {row.note}" if row.reading_of else ""
        lines.append(f"  {row.name:20} table{'s' if len(where) > 1 else ''} {', '.join(where)}: {what}{other}")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print settings and rows, write nothing")
    parser.add_argument("--resolved", type=Path, metavar="DIR", help="write all flags of all rows, a file a setting")
    parser.add_argument("--setting", default="", help="a file of examples/paper/settings")
    parser.add_argument("--row", default="", help="a row of examples/paper/rows.yaml")
    parser.add_argument("--save", type=Path, help="file to write")
    parser.add_argument("--small-world", type=Path, metavar="DIR", help="a smoke run with these models and prompts")
    parser.add_argument("--student", default="", help="instead of the setting's")
    parser.add_argument("--teacher", default="", help="instead of the setting's")
    parser.add_argument("--prompt-data", default="", help="prompts, with a response of the teacher where it is read")
    parser.add_argument("--eval-data", default="", help="held-out prompts with answers")
    parser.add_argument("--sglang-python", default="", help="interpreter of SGLang's environment")
    args = parser.parse_args()
    if not (args.list or args.resolved) and args.save is None:
        parser.error("--save is missing: name the file to write")
    return args


if __name__ == "__main__":
    sys.exit(main())
