"""Files and folders that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the name of a temporary file, which becomes ``path`` if no error is raised."""
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    finally:
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
