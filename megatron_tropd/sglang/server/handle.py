"""The interface of a server that this job starts, on this machine or on another one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from megatron_tropd.sglang.settings import ServerSettings


class ServerHandle(Protocol):
    """A server process that may be started again after it died."""

    url: str
    """Of the last start."""
    log: Path
    """Of the last start, on the server's machine."""
    is_local: bool
    """Whether it runs on this machine."""

    @property
    def pid(self) -> int | None:
        """Process id on its machine; None before the first start."""

    def start(self) -> None:
        """Start on a new port; returns long before the server answers.

        Raises:
            OSError: the interpreter, the log directory or the machine cannot be used.
        """

    def is_running(self) -> bool:
        """Whether the process exists; it may not answer yet."""

    def exit_status(self) -> int | None:
        """Exit status; None while the process runs."""

    def log_tail(self) -> str:
        """The last lines of its log, for error messages."""

    def stop(self) -> None:
        """End the process.  May be called twice."""


MakeServer = Callable[[ServerSettings, int, int], ServerHandle]
"""Makes server number ``index`` from (settings, index, max_position_embeddings)."""
