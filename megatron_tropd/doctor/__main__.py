"""Look at this machine before a run: ``python -m megatron_tropd.doctor``, on every node.

Prints what was found, what is missing, and what that costs.  Exit codes: 0 a run can work, 1 it could not, 2 a flag is
wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_tropd.doctor.versions import OLDEST_PYTHON
from megatron_tropd.flag_parser import FlagParser
from megatron_tropd.standard_streams import OutputError, open_closed, print_result, tell

if TYPE_CHECKING:
    from megatron_tropd.doctor.finding import Finding

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
_STATE_WIDTH, _NAME_WIDTH = 9, 28
_NARROWEST, _WIDEST = 80, 120


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser of this command."""
    flags = FlagParser(
        prog="python -m megatron_tropd.doctor",
        description="What this machine has for a run, what is missing and what that costs.",
    )
    flags.add_argument("--json", action="store_true", help="print the findings as JSON")
    flags.add_argument(
        "--sglang-python", default="", metavar="PATH", help="as for training: interpreter of SGLang's environment"
    )
    return flags


def count(findings: Sequence[Finding], state: str) -> int:
    """Return how many of ``findings`` have this state."""
    return sum(finding.state == state for finding in findings)


def _number(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "s")


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    """Return ``text`` in lines; flags and paths stay whole, and can be copied."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False, break_long_words=False
    )


def table(findings: Sequence[Finding], width: int) -> str:
    """Return the findings as text in lines of at most ``width`` characters: headings, rows, advice below its row."""
    lines: list[str] = []
    subject = ""
    for finding in findings:
        if finding.subject != subject:
            subject = finding.subject
            lines += ["", subject] if lines else [subject]
        head = f"  {_MARKS[finding.state]:<{_STATE_WIDTH}}{finding.name:<{_NAME_WIDTH}}"
        column = " " * (2 + _STATE_WIDTH + _NAME_WIDTH)
        lines += _wrapped(finding.found, width, head, column)
        indent = " " * (2 + _STATE_WIDTH + 2)
        lines += _wrapped(finding.advice, width, indent, indent)
    summary = f"{_number(count(findings, 'problem'), 'problem')}, {_number(count(findings, 'note'), 'note')}"
    return "\n".join([*lines, "", summary])


def document(findings: Sequence[Finding]) -> str:
    """Return the findings as JSON."""
    return json.dumps(
        {
            "problems": count(findings, "problem"),
            "notes": count(findings, "note"),
            "findings": [dataclasses.asdict(finding) for finding in findings],
        },
        indent=2,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    open_closed()
    args = parser().parse_args(argv)
    if sys.version_info < OLDEST_PYTHON:
        version, oldest = sys.version.split()[0], ".".join(map(str, OLDEST_PYTHON))
        print(f"This is Python {version}; the package needs {oldest} or newer.", file=sys.stderr)
        return 1

    from megatron_tropd.doctor import examine  # cannot be imported by an older Python

    findings = examine.judge(examine.probe(args.sglang_python))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path or an error may have what a terminal cannot show
    width = shutil.get_terminal_size((100, 24)).columns
    try:
        print_result(document(findings) if args.json else table(findings, min(max(width, _NARROWEST), _WIDEST)))
    except OutputError as error:
        tell(f"error: {error}")
        return error.exit_code
    return 1 if count(findings, "problem") else 0


if __name__ == "__main__":
    sys.exit(main())
