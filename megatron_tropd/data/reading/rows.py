"""A row of the data with its place, and the errors about rows and files that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record and its place: file and line or row."""

    path: str
    line: int
    """Line number (JSONL) or row number (everything else), from 1."""
    value: dict[str, object]
    keys: tuple[str, ...]
    """All keys of the record, including columns that were not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A record or, with line 0, a whole file that cannot be used."""

    path: str
    line: int
    found: str
    expected: str
    flag: str
    """The flag to change; "" if only a change of the file helps."""

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        remedy = f"; see {self.flag}" if self.flag else ""
        return f"{place}: {self.found}; expected {self.expected}{remedy}"


class PromptError(ValueError):
    """The prompt files have bad rows; the message shows the first of them.

    ``rows`` holds the problems whose details were kept (all of them unless there are very many), ``count`` is the
    number of all.
    """

    def __init__(self, rows: Sequence[BadRow], count: int | None = None) -> None:
        self.rows = tuple(rows)
        self.count = len(self.rows) if count is None else count
        lines = [f"prompts: {self.count} problem{'s' * (self.count != 1)} in the prompt data"]
        shown = self.rows[:_SHOWN]
        lines += [f"  {row}" for row in shown]
        if self.count > len(shown):
            lines.append(f"  ... and {self.count - len(shown)} more")
        if all(row.line for row in self.rows):
            lines.append("mend the rows, or leave them out with --on-bad-row skip")
        super().__init__("\n".join(lines))


def kind_of(value: object, article: str = "a") -> str:
    """Return a value that is of the wrong type as text for a message: its type and what it is."""
    return "null" if value is None else f"{article} {type(value).__name__}: {show(value)}"


def show(value: object, limit: int = 60) -> str:
    """Return ``value`` as a short ASCII text for an error message."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
