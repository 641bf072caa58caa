"""When a run stops before its last step: a signal, a file, an interval, a duration.  The same command goes on."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.parallel.fail_together import is_rank_zero
from megatron_tropd.parallel.stop_request import StopRequest

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: the same command goes on."""
STOP_FILE = "stop"
"""In the run directory.  Whoever makes it stops the run; the run deletes it."""
STOPPED_FILE = "stopped"
"""In the run directory, from the end of a run that has stopped to its next start: what asked for it."""


class Stopped(Exception):
    """The run has saved itself and ends before its last step, on every rank alike."""

    exit_code = EXIT_STOPPED


class Stopping:
    """Knows whether the run is to stop.

    Args:
        config: of the run.
        request: what a signal to this rank asked for.
        started_s: when the run's time began, on the clock of ``time.monotonic``.
        tell: tells the other worlds of the job what asked a run to stop that has saved; called on rank 0.
    """

    def __init__(
        self, config: TrainConfig, request: StopRequest, started_s: float, tell: Callable[[str], None] = lambda _: None
    ) -> None:
        self._settings, self._request, self._started_s, self._tell = config.checkpoint, request, started_s, tell
        self._file = Path(config.logging.run_dir) / STOP_FILE
        self._stopped = stopped_file(config)

    def why(self, steps_done: int | None = None) -> str | None:
        """Return what asked for a stop, of any rank and the same on every rank; None if nothing did.  Collective.

        ``steps_done`` is given between two steps, where --exit-interval counts.
        """
        return next((why for why in gather_objects(self._why_here(steps_done)) if why), None)

    def _why_here(self, steps_done: int | None) -> str | None:
        if self._request.why is not None:
            return self._request.why
        interval, minutes = self._settings.exit_interval, self._settings.exit_duration_in_mins
        if interval and steps_done is not None and steps_done % interval == 0:
            return f"--exit-interval {interval}"
        if not is_rank_zero():  # one clock, and one that looks for the file
            return None
        if minutes and time.monotonic() - self._started_s > 60 * minutes:
            return f"--exit-duration-in-mins {minutes}"
        return f"the file {self._file}" if os.path.exists(self._file) else None  # False also where it cannot be known

    def begin(self) -> None:
        """Forget what earlier launches left: a file that asked one to stop, and the word of one that has stopped."""
        if is_rank_zero():
            _delete(self._file)
            _delete(self._stopped)

    def obeyed(self, why: str) -> None:
        """Say that the run has saved and stops, and delete the file that asked for it."""
        if is_rank_zero():
            with contextlib.suppress(OSError):  # the state is saved, which matters
                self._stopped.write_text(f"{why}\n", encoding="utf-8")
            _delete(self._file)
            self._tell(why)


def stopped_file(config: TrainConfig) -> Path:
    """Return the file that says to job scripts that the run has stopped."""
    return Path(config.logging.run_dir) / STOPPED_FILE


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
