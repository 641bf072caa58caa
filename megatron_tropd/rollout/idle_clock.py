"""Measures the share of the time in which the engines of a pool had nothing to write."""

from __future__ import annotations

import threading
import time


class IdleClock:
    """Started and stopped by whoever knows when a batch is in writing; safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = time.perf_counter()
        self._busy_s = 0.0
        self._started: float | None = None

    def start(self) -> None:
        """A batch is in writing from now on."""
        with self._lock:
            self._started = time.perf_counter()

    def stop(self) -> None:
        """Nothing is in writing from now on.  May be called twice."""
        with self._lock:
            self._count(time.perf_counter())
            self._started = None

    def _count(self, now: float) -> None:
        if self._started is not None:
            self._busy_s += now - self._started
            self._started = now

    def idle_share(self) -> float:
        """Return the share of the time since the last call in which nothing was in writing, in [0, 1]."""
        with self._lock:
            now = time.perf_counter()
            self._count(now)
            share = 1 - self._busy_s / max(now - self._since, 1e-9)
            self._since, self._busy_s = now, 0.0
            return min(max(share, 0.0), 1.0)
