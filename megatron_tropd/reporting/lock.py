"""One job per run directory.

The lock is a small JSON file with host and process.  The file is never unlinked, only rewritten under ``flock``
(a path that is unlinked and made again can be "taken" by two jobs at once).  A lock is stale if its process is gone:
same host and no such process, or, on a cluster, the same Slurm job started again.  For a process on another host this
cannot be known, so the error says what to do.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil


class RunDirectoryBusyError(OSError):
    """Another job holds the run directory."""


class RunLock:
    """Holds the lock file from construction to :meth:`release`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mine = describe_this_process()
        with _exclusive(path) as stream:
            owner = _read(stream)
            if owner and not is_stale(owner):
                raise RunDirectoryBusyError(
                    f"{path.parent} is in use by process {owner.get('pid')} on host "
                    f"{owner.get('host')}: give this job its own directory, or, if that job is gone, delete {path}"
                )
            _write(stream, self._mine)
        atexit.register(self.release)

    def release(self) -> None:
        """Release the lock; does nothing in a forked child or where another job has taken the lock over."""
        atexit.unregister(self.release)
        if self._mine["pid"] != os.getpid() or not self._path.exists():
            return
        with contextlib.suppress(OSError), _exclusive(self._path) as stream:
            if _read(stream) == self._mine:
                _write(stream, {})


def describe_this_process() -> dict[str, Any]:
    """The identity of this process, as it is written into the lock."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def is_stale(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote the lock is known to be gone."""
    here = describe_this_process()
    same_job = bool(owner.get("slurm_job")) and owner["slurm_job"] == here["slurm_job"]
    if same_job and owner.get("slurm_restart", 0) < here["slurm_restart"]:
        return True  # a requeued job keeps its id, and starts only after its previous run has ended
    if owner.get("host") != here["host"]:
        return False
    try:
        process = psutil.Process(int(owner["pid"]))
        # The system reuses process ids; the start time tells apart two processes with one id.
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - owner["started"]) > 1.0
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[TextIO]:
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as stream:
        # Some network file systems have no flock; the lock then still works, except for a race of microseconds.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def _read(stream: TextIO) -> dict[str, Any]:
    stream.seek(0)
    try:
        owner = json.loads(stream.read() or "{}")
    except ValueError:
        return {}  # an incomplete lock: its writer died while writing
    return owner if isinstance(owner, dict) else {}


def _write(stream: TextIO, owner: dict[str, Any]) -> None:
    stream.seek(0)
    stream.truncate()
    stream.write(json.dumps(owner) if owner else "")
    stream.flush()
