"""Files and folders that are there as a whole or not at all, and errors that say which file could not be written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

_ADVICE = {
    errno.ENOSPC: "free space there, or name another directory",
    errno.EDQUOT: "delete files of this user or group there, or name another directory",
    errno.EIO: "the disk or the file server failed; the kernel's log of that machine may say more",
    errno.EROFS: "name another directory, or have it mounted for writing",
}
DISK_ERRORS = frozenset(_ADVICE)
"""What a disk says that is full, over its quota, broken or read-only: another disk may do."""


class CannotWrite(OSError):
    """A file cannot be written; the text says which one, why and what to do."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file an OSError of the block is about: that of a failed write does not know.

    Raises:
        CannotWrite: with the errno of the error.  An error that names a file stays as it is, unless it is of the disk.
    """
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        named = error.filename if error.filename2 is None else error.filename2
        here = named is not None and str(named).startswith(str(path.parent)) and error.errno in DISK_ERRORS
        if named is not None and not here:
            raise
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """Return the error that names ``path``."""
    return CannotWrite(error.errno or 0, f"{path} cannot be written ({reason_of(error)})")


def reason_of(error: OSError) -> str:
    """Return what is wrong, and what to do about it if the disk is full, broken or read-only."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{reason}{advice and ': '}{advice}"


def is_of_the_disk(text: str) -> bool:
    """Return whether the text of an error has one of :data:`DISK_ERRORS` as its reason.

    It is asked of the text because that is what all ranks know of an error: each then has the same answer.
    """
    return any(os.strerror(number) in text for number in DISK_ERRORS)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file, which becomes ``path`` if no error is raised.

    Raises:
        CannotWrite: it cannot be written; what was at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    with writing(path):
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # the error that is raised matters more
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 to ``path``, whole or not at all; lone surrogates, which a model's text may hold, become ``?``."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors="replace"))


def exchange(one: Path, other: Path) -> bool:
    """Give each of two files or folders the name of the other, so that neither name is ever missing.

    Returns whether it was done: Linux has a system call for it, which many file systems of networks refuse.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    here, exchange_names = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(call(here, os.fsencode(one), here, os.fsencode(other), exchange_names) == 0)


def remove_unfinished(directory: Path) -> None:
    """Remove what writers of :func:`replacing` that were killed left in a directory nobody else writes to."""
    for left in directory.glob(".*.*"):
        if left.is_file() and left.suffix[1:].isdecimal():  # of its name the process id comes last
            left.unlink(missing_ok=True)
