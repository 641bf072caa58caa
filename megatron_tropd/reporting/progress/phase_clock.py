"""Wall seconds by phase, so that the phases of a step add up to the time spent in them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class PhaseClock:
    """Charges time to the innermost open phase: an evaluation inside ``train`` is not counted twice.

    On a GPU the caller synchronises inside a phase whose kernels it wants to charge to that phase; reading the loss
    synchronises.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = {}

    @property
    def current(self) -> str:
        """The innermost open phase, or an empty string."""
        return self._open[-1] if self._open else ""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the body to ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def take_seconds(self) -> dict[str, float]:
        """Seconds charged to each phase since the last call."""
        self._charge()
        taken, self._seconds = self._seconds, {}
        return taken

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
