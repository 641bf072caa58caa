"""Cause every fault of the matrix, and print what came of it: ``make faults``.

    python -m tools.faults.run [--only 5 6] [--write docs/faults.md] [-- words for pytest]

Runs the tests that are marked with a row of the matrix (``@pytest.mark.fault(number=N)``): real processes, signals,
files and sockets on this machine.  A row passes if all of its tests do; a row whose tests need an environment that is
not there says so.  Seconds are the largest that a row's tests report.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_tropd.flag_parser import FlagParser
from tools.faults.matrix import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
_FIGURES = ("detect_s", "recover_s", "steps_lost")


@dataclass(slots=True)
class Outcome:
    """What the tests of one row gave."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """``passed``, or why not."""
        if self.failed:
            return f"{self.failed} of {self.passed + self.failed} failed"
        if self.passed:
            return "passed"
        return "not run: an environment is missing" if self.skipped else "no test yet"


def outcomes(report: Path) -> dict[int, Outcome]:
    """Return the outcome of each row from pytest's JUnit report."""
    found: dict[int, Outcome] = {fault.number: Outcome() for fault in FAULTS}
    for case in ElementTree.parse(report).iter("testcase"):
        properties = [(p.get("name", ""), p.get("value", "")) for p in case.iter("property")]
        for number in {int(value) for name, value in properties if name == "fault"}:
            row = found[number]
            row.seconds += float(case.get("time", "0"))
            if case.find("failure") is not None or case.find("error") is not None:
                row.failed += 1
            elif case.find("skipped") is not None:
                row.skipped += 1
            else:
                row.passed += 1
            for name, value in properties:
                if name in _FIGURES:
                    row.figures[name] = max(row.figures.get(name, 0.0), float(value))
    return found


def table(found: Mapping[int, Outcome], rows: Sequence[Fault]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| # | fault | expected | seen | detected, s | recovered, s | steps lost | tests | tests took, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for fault in rows:
        row = found[fault.number]
        detect, recover, lost = (f"{row.figures[name]:.0f}" if name in row.figures else "" for name in _FIGURES)
        tests = row.passed + row.failed
        cells = (fault.number, fault.what, fault.expected, row.word, detect, recover, lost, tests, f"{row.seconds:.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def parser() -> FlagParser:
    """Return the parser of the command."""
    flags = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--only", nargs="+", type=int, choices=[fault.number for fault in FAULTS], help="rows; default: all"
    )
    flags.add_argument("--write", type=Path, help="also replace the table in this file")
    flags.add_argument("words", nargs="*", help="handed to pytest")
    return flags


def replace_table(path: Path, new: str) -> None:
    """Replace the first table with a column ``fault`` in a Markdown file."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    first = next(index for index, line in enumerate(lines) if line.startswith("| # | fault |"))
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    path.write_text("".join([*lines[:first], new, *lines[last:]]), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 if every row passed."""
    options = parser().parse_args(argv)
    rows = [fault for fault in FAULTS if not options.only or fault.number in options.only]
    marks = " or ".join(f"fault(number={fault.number})" for fault in rows) if options.only else "fault"
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        words = [sys.executable, "-m", "pytest", "-q", "-m", marks, f"--junitxml={report}", *options.words]
        subprocess.run(words, cwd=ROOT, check=False)
        found = outcomes(report)
    text = table(found, rows)
    print(text)
    passed = sum(found[fault.number].word == "passed" for fault in rows)
    print(f"{passed} of {len(rows)} rows passed")
    if options.write is not None:
        replace_table(options.write, text)
    return 0 if passed == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
