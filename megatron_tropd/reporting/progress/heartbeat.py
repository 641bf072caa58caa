"""Says what rank 0 is doing while a phase lasts long, so that a hang can be told from work.

A thread writes ``heartbeat.json`` in the run directory every --heartbeat-interval seconds, and a line to the log where
the phase has lasted at least that long.  It only reads what the main thread publishes, and takes no lock that a
checkpoint writer, which is forked from this process, could find held.

``heartbeat.json``::

    time         when it was written, UTC
    step         the step being made; before the first one, the step that the run starts from
    phase        generate, score, train, push, save, eval; "" between them; "ended" after the last step
    seconds      in this phase
    counts       {"done", "total", "unit"}; null for a phase that does not count
    unchanged    seconds since step, phase or counts last changed
    interval     seconds until the next one
    host, pid    of rank 0
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from megatron_tropd.atomic_files import CannotWrite, cannot_write, write_text
from megatron_tropd.types import Counts

FILE = "heartbeat.json"
ENDED = "ended"
GetCounts = Callable[[], Counts | None]
"""Says how far a phase is; called from another thread than the one that works, so it only reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activity:
    """What a rank does now."""

    step: int
    phase: str
    since: float
    """``time.monotonic()`` when the phase began."""
    counts: GetCounts | None = None


class Heartbeat:
    """Writes what rank 0 does, from :meth:`start` to :meth:`stop`.

    Args:
        directory: of the run.
        interval_s: seconds between two beats; 0 for none at all.
        activity: says what rank 0 does.
        write_line: prints one line of the log; an OSError of it is ignored, because the main thread meets it too.
    """

    def __init__(
        self, directory: Path, interval_s: float, activity: Callable[[], Activity], write_line: Callable[[str], None]
    ) -> None:
        self._activity = activity
        self._path, self._interval, self._write_line = directory / FILE, interval_s, write_line
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen: tuple[object, ...] = ()
        self._changed = time.monotonic()
        self._complained = False

    def start(self) -> None:
        """Write the first beat, and go on in a thread."""
        if self._interval:
            self._beat()
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the thread, and write that the steps have ended, so that nobody waits for a next beat."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None
            ended = Activity(step=self._activity().step, phase=ENDED, since=time.monotonic())
            self._activity = lambda: ended
            self._beat()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._beat()

    def _beat(self) -> None:
        now, activity = time.monotonic(), self._activity()
        counts = activity.counts() if activity.counts else None
        seen = (activity.step, activity.phase, activity.since, counts)
        if seen != self._seen:
            self._seen, self._changed = seen, now
        seconds, unchanged = now - activity.since, now - self._changed
        if activity.phase not in ("", ENDED) and seconds >= self._interval:
            self._say(line(activity, seconds, counts, unchanged))
        record = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": activity.step,
            "phase": activity.phase,
            "seconds": round(seconds, 1),
            "counts": None if counts is None else asdict(counts),
            "unchanged": round(unchanged, 1),
            "interval": self._interval,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        try:
            write_text(self._path, json.dumps(record) + "\n")
            self._complained = False
        except OSError as error:  # a full disk ends the run only when something that matters cannot be written
            if not self._complained:
                told = error if isinstance(error, CannotWrite) else cannot_write(self._path, error)
                self._say(f"warning: {told}; the run goes on")
            self._complained = True

    def _say(self, text: str) -> None:
        try:
            self._write_line(text)
        except OSError:
            return


def line(activity: Activity, seconds: float, counts: Counts | None, unchanged: float) -> str:
    """Return the line of a beat, such as ``step 12, generate: 63 s, 37 of 128 prompts``."""
    text = f"step {activity.step}, {activity.phase}: {seconds:.0f} s"
    if counts is None:
        return text
    text += f", {counts.done} of {counts.total} {counts.unit}"
    return text if unchanged < 1 else f"{text}, none new for {unchanged:.0f} s"
