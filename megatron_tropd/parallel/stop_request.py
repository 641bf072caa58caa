"""A request to stop, from the thread that receives signals to the code that can save first."""

from __future__ import annotations

import threading


class StopRequest:
    """Asked for at most once; may be asked in one thread and read in another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._why: str | None = None

    @property
    def why(self) -> str | None:
        """What asked for the stop; None as long as nothing did."""
        return self._why

    def ask(self, why: str) -> bool:
        """Ask for a stop because of ``why``; return whether this is the first time."""
        with self._lock:
            if self._why is not None:
                return False
            self._why = why
            return True
