"""One job per run directory.

The lock is the kernel's (``flock``) on a small file that is open as long as the job runs, so that no dead process holds
it.  The file says who holds it (:mod:`lock_record`), for people and for what the kernel cannot know: on a network file
system ``flock`` may not reach the other machines, or not exist.  There the holder's heartbeat counts: it renews the
file's time every ``RENEW_S``, and a lock that was not renewed for ``STALE_S`` is taken over.  A job that comes back
after that (it was stopped, or its network was gone) finds another's record, and ends at its next :meth:`RunLock.check`.

The file is never unlinked, only rewritten (a path that is unlinked and made again can be "taken" by two jobs at once).
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

from megatron_tropd.atomic_files import writing
from megatron_tropd.reporting.lock_record import LockRecord, is_gone, is_same_machine

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
"""In the run directory."""
RENEW_S = 30.0
"""Time between two renewals.  They come from a thread, which waits for code that holds Python's interpreter lock."""
STALE_S = 300.0
"""Ten renewals: so long may a file server be away, or code hold the interpreter lock."""
_SETTLE_S = 1.0
"""Without ``flock``: until a job that takes the lock at the same time has written its record over ours."""
_MAX_BYTES = 1 << 16


class RunDirectoryBusyError(OSError):
    """Another job holds the run directory."""


class RunLock:
    """Holds the lock file from construction to :meth:`release`.

    Args:
        path: of the lock file, in the directory that it is for.
        renew_s, stale_s: see RENEW_S, STALE_S; the same in all jobs.

    Raises (constructor):
        RunDirectoryBusyError: another job holds it; the message says who, since when, and what to do.
        OSError: the file cannot be made or written.
    """

    def __init__(self, path: Path, *, renew_s: float = RENEW_S, stale_s: float = STALE_S) -> None:
        self._path = path
        # Not inherited by programs that this job starts: only forks of it share the kernel's lock.
        with writing(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            self._mine = self._take(stale_s)
        except BaseException:
            os.close(self._file)
            raise
        self._ends = threading.Event()
        threading.Thread(target=self._renew, args=(renew_s,), name="run-lock", daemon=True).start()
        atexit.register(self.release)

    def check(self) -> None:
        """Raises RunDirectoryBusyError if another job has taken the lock over since, as far as can be known now."""
        try:
            owner = self._owner()
        except OSError as error:
            log.warning("%s could not be read: %s", self._path, error.strerror)
            return
        if owner is not None and owner != self._mine:
            raise RunDirectoryBusyError(
                f"{self._path.parent} was taken over by {owner.describe()}, because this job did not renew its lock "
                "for minutes: it was stopped, or could not reach the directory.  This job ends; the other one goes on"
            )

    def release(self) -> None:
        """Release the lock; does nothing in a forked child or where another job has taken the lock over."""
        atexit.unregister(self.release)
        if self._mine.pid != os.getpid() or self._ends.is_set():
            return
        self._ends.set()
        try:
            if self._owner() == self._mine:
                os.ftruncate(self._file, 0)
        except OSError as error:
            log.warning("%s could not be emptied: %s", self._path, error.strerror)
        finally:
            os.close(self._file)

    def _take(self, stale_s: float) -> LockRecord:
        kernel = self._lock_by_kernel(stale_s)
        mine = LockRecord.of_this_process(kernel=kernel)
        owner = _read(self._file)
        if owner is not None and not is_gone(owner, mine):
            age = _age(self._path)
            if abs(age) < stale_s:  # a time far in the future is no renewal either: a clock jumped
                raise _busy(
                    self._path, owner, age,
                    f"if that job is gone, wait: {stale_s - age:.0f} s from now its lock is taken over",
                )  # fmt: skip
            log.warning(
                "%s was in use by %s, whose lock was not renewed for %.0f s: it is taken over",
                self._path.parent, owner.describe(), age,
            )  # fmt: skip
        _write(self._path, self._file, mine)
        if not kernel:
            time.sleep(_SETTLE_S)
            if (other := _read(self._file)) is not None and other != mine:
                raise _busy(self._path, other, _age(self._path), "it was started at the same time")
        return mine

    def _lock_by_kernel(self, stale_s: float) -> bool:
        """Return whether the kernel now holds the lock; False where the file system has none."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            owner, age = _read(self._file), _age(self._path)
            advice = "if that job is gone, a process that it forked still holds the lock: end that"
            if owner is not None and age > stale_s and not is_same_machine(owner, LockRecord.of_this_process()):
                # A file server may keep the lock of a machine that crashed; nothing here can take it away.
                advice = f"if that machine is gone, the file server keeps its lock: delete {self._path}"
            raise _busy(self._path, owner, age, advice) from None
        return True

    def _renew(self, renew_s: float) -> None:
        while not self._ends.wait(renew_s):
            try:
                if self._owner() == self._mine:
                    os.utime(self._path)
            except OSError as error:
                log.warning("%s could not be renewed: %s", self._path, error.strerror)

    def _owner(self) -> LockRecord | None:
        """What the path holds now, which may be another file than ours if somebody deleted that."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return _read(file)
        finally:
            os.close(file)


def _busy(path: Path, owner: LockRecord | None, age: float, advice: str) -> RunDirectoryBusyError:
    who = owner.describe() if owner else "a job that has not written its name yet"
    return RunDirectoryBusyError(
        f"{path.parent} is in use by {who}, last heard of {max(age, 0.0):.0f} s ago: give this job its own directory; "
        f"{advice}"
    )


def _read(file: int) -> LockRecord | None:
    return LockRecord.read(os.pread(file, _MAX_BYTES, 0).decode(errors="replace"))


def _write(path: Path, file: int, record: LockRecord) -> None:
    data = record.text().encode()
    with writing(path):
        os.pwrite(file, data, 0)  # one call, so that no reader finds an empty file between two jobs
        os.ftruncate(file, len(data))


def _age(path: Path) -> float:
    """Seconds since the file was renewed, by the clock of the file system: machines' clocks differ."""
    with writing(path), tempfile.TemporaryFile(dir=path.parent) as now:
        now.write(b"x")
        now.flush()
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
