"""Where a section puts its rows, each on disk as soon as it is known: a section that is killed keeps those it had.

Needs no torch.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .table import Row, Verdict, finite

_LAST_LINES, _LONGEST_REASON = 4, 700


def reason_of(error: BaseException) -> str:
    """Return the last lines of an exception with its traceback, for a cell of the table."""
    lines = [line.strip() for line in "".join(traceback.format_exception(error)).splitlines()]
    text = " / ".join([line for line in lines if line and set(line) - set("^~ ")][-_LAST_LINES:])
    return text if len(text) <= _LONGEST_REASON else f"... {text[-_LONGEST_REASON:]}"


def judge(value: float, *, at_most: float | None = None, at_least: float | None = None) -> bool:
    """Return whether a number keeps its bounds; NaN keeps none."""
    if math.isnan(value):
        return False
    return (at_most is None or value <= at_most) and (at_least is None or value >= at_least)


class Report:
    """The rows of one section, appended to ``file`` as lines of JSON."""

    def __init__(self, section: str, file: Path) -> None:
        self._section, self._file = section, file

    def add(
        self, what: str, verdict: Verdict, *, expected: str = "", measured: str = "", reason: str = "",
        value: float | None = None, details: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Add a row with a verdict of the caller's."""
        row = Row(
            section=self._section, what=what, verdict=verdict, expected=expected, measured=measured, reason=reason,
            value=finite(value), details=tuple(details),
        )  # fmt: skip
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def limit(
        self, what: str, value: float, at_most: float, *, form: str = ".1e", unit: str = "", reason: str = ""
    ) -> None:
        """Add a number with a limit of correctness."""
        verdict: Verdict = "pass" if judge(value, at_most=at_most) else "failed"
        self.add(
            what, verdict, expected=f"at most {at_most:{form}}{unit}", measured=f"{value:{form}}{unit}", reason=reason,
            value=value,
        )  # fmt: skip

    def same(self, what: str, equal: bool, *, measured: str = "", reason: str = "") -> None:
        """Add a comparison, bit for bit, that has to hold."""
        said = measured or ("equal" if equal else "different")
        self.add(what, "pass" if equal else "failed", expected="equal, bit for bit", measured=said, reason=reason)

    def goal(
        self, what: str, value: float, *, at_most: float | None = None, at_least: float | None = None,
        applies: bool = True, form: str = ".2f", unit: str = "", reason: str = "", details: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Add a number with a goal of speed or memory.

        Args:
            what: Name of the number.
            value: The number.
            at_most: The goal, or ``at_least``.
            at_least: See ``at_most``.
            applies: Whether the goal is for this hardware and these sizes; if not, the number is only measured.
            form: Format of the number.
            unit: Follows the number.
            reason: What there is to know about it.
            details: Lines for the JSON file.
        """
        bounds = [
            f"at {word} {bound:{form}}{unit}"
            for word, bound in (("most", at_most), ("least", at_least))
            if bound is not None
        ]
        verdict: Verdict = "pass" if judge(value, at_most=at_most, at_least=at_least) else "miss"
        self.add(
            what, verdict if applies else "measured", expected=f"goal: {' and '.join(bounds)}" if applies else "",
            measured=f"{value:{form}}{unit}", reason=reason, value=value, details=details,
        )  # fmt: skip

    def measured(
        self, what: str, value: float, *, form: str = ",.2f", unit: str = "", reason: str = "",
        details: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Add a number that has neither limit nor goal."""
        self.add(what, "measured", measured=f"{value:{form}}{unit}", reason=reason, value=value, details=details)

    def not_run(self, what: str, reason: str) -> None:
        """Add what was not run, and why."""
        self.add(what, "not run", reason=reason)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Make an exception a row ``failed`` and go on with the rest of the section, with the memory freed."""
        try:
            yield
        except Exception as error:  # of any kind: the rest of the section is worth its numbers
            traceback.print_exc()
            self.add(what, "failed", reason=reason_of(error))
            error.__traceback__ = None  # its frames hold the tensors of the attempt
        free_memory()


def free_memory() -> None:
    """Return unused memory to the GPU, if this process uses one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
