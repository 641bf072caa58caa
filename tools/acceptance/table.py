"""Rows, and the JSON and Markdown files that are made of them.  Needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_tropd.atomic_files import write_text

Verdict = Literal["pass", "miss", "failed", "not run", "measured"]
"""``pass``: a limit of correctness or a goal of speed holds.  ``miss``: a goal of speed is not reached.  ``failed``: a
limit of correctness does not hold, or the section broke.  ``measured``: a number without a limit or a goal."""
JSON_FILE, MARKDOWN_FILE = "acceptance.json", "acceptance.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    section: str
    """Letter of the section."""
    what: str
    verdict: Verdict
    expected: str = ""
    """The limit or the goal, in words."""
    measured: str = ""
    reason: str = ""
    """Why it failed or was not run, or what there is to know about the number."""
    value: float | None = None
    """The number in ``measured``; None if there is none, or if it is NaN or infinite."""
    details: tuple[str, ...] = ()
    """Lines for the JSON file that would be too long for the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionEnd:
    """How long a section took, and how it ended."""

    letter: str
    title: str
    seconds: float
    how: str
    """``ended``, ``killed at its deadline`` ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Everything that the files hold."""

    command: str
    hardware: Mapping[str, str]
    sections: Sequence[SectionEnd]
    rows: Sequence[Row]

    @property
    def good(self) -> bool:
        """Whether no row failed; goals of speed that were missed, and what was not run, are no failures."""
        return all(row.verdict != "failed" for row in self.rows)


def finite(value: float | None) -> float | None:
    """Return ``value``, or None where JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def read_row(value: Mapping[str, Any]) -> Row:
    """Return a row from what ``dataclasses.asdict`` made of one."""
    return Row(**{**value, "details": tuple(value["details"])})


def _cell(text: str) -> str:
    """Return the text in one line, without what would end a cell of a Markdown table."""
    return " ".join(text.replace("|", "/").split())


def markdown(results: Results) -> str:
    """Return the whole Markdown file."""
    counts: dict[str, int] = {}
    for row in results.rows:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
    lines = ["# Acceptance on one GPU", "", f"    {results.command}", ""]
    lines += [f"- {name}: {value}" for name, value in results.hardware.items()]
    lines += ["", ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "no rows yet", ""]
    lines += ["| section | seconds | |", "|---|---|---|"]
    lines += [
        f"| {end.letter}. {_cell(end.title)} | {end.seconds:.0f} | {_cell(end.how)} |" for end in results.sections
    ]
    lines += ["", "| | what | expected | measured | verdict | |", "|---|---|---|---|---|---|"]
    for row in results.rows:
        cells = (row.section, row.what, row.expected, row.measured, row.verdict, row.reason)
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def write(directory: Path, results: Results) -> None:
    """Write both files anew."""
    value = {
        "command": results.command,
        "hardware": dict(results.hardware),
        "sections": [asdict(end) for end in results.sections],
        "rows": [asdict(row) for row in results.rows],
    }
    write_text(directory / JSON_FILE, json.dumps(value, indent=1, allow_nan=False) + "\n")
    write_text(directory / MARKDOWN_FILE, markdown(results))
