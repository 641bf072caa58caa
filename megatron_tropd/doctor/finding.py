"""What one check of the doctor says, and what it says when it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's table."""

    subject: str
    """The heading it stands under."""
    name: str
    found: str
    state: Literal["ok", "note", "problem"]
    """note: a run works, but is slower or lacks something; problem: a run could not work."""
    advice: str = ""
    """What it costs and what to do, with the flag or the command that changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """Makes the findings of one subject."""

    title: str

    def ok(self, name: str, found: str) -> Finding:
        """Nothing to do."""
        return Finding(subject=self.title, name=name, found=found, state="ok")

    def note(self, name: str, found: str, advice: str) -> Finding:
        """A run works, but is slower or lacks something."""
        return Finding(subject=self.title, name=name, found=found, state="note", advice=advice)

    def problem(self, name: str, found: str, advice: str) -> Finding:
        """A run could not work."""
        return Finding(subject=self.title, name=name, found=found, state="problem", advice=advice)

    def failed(self, name: str, error: BaseException) -> Finding:
        """A check raised ``error``.  That is a problem, because nothing shows that a run could work."""
        found = f"this check failed: {type(error).__name__}: {error}"
        advice = "Nothing is known about this part; the other findings hold."
        return self.problem(name, found, advice)


class Attempts:
    """Reads the facts of one subject, each on its own, so that one that cannot be read hides no other."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._failed: list[Finding] = []

    @property
    def failed(self) -> tuple[Finding, ...]:
        """A finding for each fact that could not be read."""
        return tuple(self._failed)

    def read(self, name: str, call: Callable[[], T]) -> T | None:
        """Return the value of ``call``, or None with its error noted."""
        try:
            return call()
        except Exception as error:  # whatever the machine, the doctor goes on
            self._failed.append(self._subject.failed(name, error))
            return None
