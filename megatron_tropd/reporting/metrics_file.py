"""``metrics.jsonl`` as it is written: a line that the disk refuses is kept, and written when there is room."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path

from megatron_tropd.atomic_files import cannot_write

KEPT = 10_000
"""Lines, of about two kilobytes each: more than a disk needs to be noticed and emptied."""


class MetricsFile:
    """Appends whole lines.  No error ends the run: a log is worth less than the days that it tells of.

    Args:
        path: of the file; made with the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self._waiting: deque[str] = deque(maxlen=KEPT)
        self._lost = 0
        self._cut = False
        """Whether a part of a line may stand at the end of the file."""

    @property
    def waiting(self) -> list[str]:
        """The lines that are not on the disk."""
        return list(self._waiting)

    def append(self, line: str) -> str:
        """Write ``line`` and all that waits before it; return what a person should know, "" in most cases."""
        held = len(self._waiting)
        self._lost += held == KEPT
        self._waiting.append(line)
        try:
            self._write_waiting()
        except OSError as error:
            if held:
                return ""  # it was said
            return (
                f"{cannot_write(self._path, error)}; the run goes on.  Its lines are kept in memory (the last {KEPT}) "
                "and written when they can be; they are lost if the run ends before"
            )
        lost, self._lost = self._lost, 0
        if not held:
            return ""
        gone = f"; {lost:,} before them are lost" if lost else ""
        return f"{self._path} is written again, with the {held:,} lines that had waited{gone}"

    def close(self) -> str:
        """Try once more to write what waits, and close the file; return what is lost, "" if nothing is."""
        text = ""
        try:
            if self._waiting:
                self._write_waiting()
        except OSError as error:
            text = f"{cannot_write(self._path, error)}; its last {self._lost + len(self._waiting):,} lines are lost"
        self._waiting.clear()
        self._close()
        return text

    def _write_waiting(self) -> None:
        data = "".join(f"{line}\n" for line in self._waiting).encode()
        if self._file is None:
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        if self._cut:
            data = b"\n" + data  # a line without content is left out by readers
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            self._cut = True
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
                self._cut = False
            self._close()  # a file server may have lost the descriptor
            raise
        self._cut = False
        self._waiting.clear()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None
