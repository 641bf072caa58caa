"""Print a message once on each node, whichever of the node's ranks has it first.

No rank can be chosen to print for its node: torchrun ends the other ranks as soon as one has ended, so the chosen one
may be gone before it knows anything.  The ranks of a node therefore share a small file, which says what was printed.  A
rank reads it, prints and writes it while it holds a lock on it.  So a second rank goes on (and may end, which makes
torchrun end the first) only when the text has been printed; if the first rank dies before that, the second prints.

The file is in the directory that torchrun makes for the logs of one launch, or restart, on one node.  Without torchrun
there is none, and each process prints.  If the file cannot be used, the message is printed.
"""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import stat
import sys
import time
from pathlib import Path
from typing import TextIO

from megatron_tropd.standard_streams import silence

RECORD = "end_printed"
"""Name of the file: the importance of the last message that was printed, as one digit."""
_LOCK_S = 10.0
"""How long a rank waits for another that is printing."""


class Importance(enum.IntEnum):
    """A message is printed if no other of at least its importance was."""

    NOTE = 1
    """A signal has arrived, and the job does not end yet."""
    CONSEQUENCE = 2
    """Something else ended the job: a signal arrived, or the connection to another rank was lost."""
    CAUSE = 3
    """What ended the job, or another answer to the user, such as --help."""


def print_once(text: str, importance: Importance, stream: TextIO | None = None) -> None:
    """Print ``text`` to ``stream`` (standard error), unless a rank of this node has printed as important a message."""
    stream = sys.stderr if stream is None else stream
    if _discards(stream):
        return  # as --local-ranks-filter has it; another rank may be able to print
    with contextlib.ExitStack() as stack:
        record = _open_record(stack)
        if record is not None and _printed(record) >= importance:
            return
        try:
            print(text, file=stream, flush=True)
        except (OSError, ValueError):  # the stream is full or closed
            silence(stream)
            return
        if record is not None:
            with contextlib.suppress(OSError):
                os.pwrite(record, b"%d" % importance, 0)


def _discards(stream: TextIO) -> bool:
    """Return whether the stream is the null device."""
    try:
        status, null = os.fstat(stream.fileno()), os.stat(os.devnull)
    except (OSError, ValueError):  # not a file, as in tests
        return False
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == null.st_rdev


def _record_path() -> Path | None:
    """Return the path of the record that all ranks of this launch on this node share; None where there is none.

    torchrun gives local rank R the error file ``<directory of the launch on this node>/attempt_A/R/error.json``.
    """
    directory = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent
    return directory.parent / RECORD if directory.name == os.environ.get("LOCAL_RANK") else None


def _open_record(stack: contextlib.ExitStack) -> int | None:
    """Open and lock the record until ``stack`` is left; None where that is not possible."""
    if (path := _record_path()) is None:
        return None
    try:
        record = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None
    stack.callback(os.close, record)
    deadline = time.monotonic() + _LOCK_S
    while time.monotonic() < deadline:
        try:
            fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:  # a file system without locks: two ranks that come at the same moment both print
            break
        else:
            break
    return record


def _printed(record: int) -> int:
    """Return the importance of what was printed, 0 for nothing."""
    with contextlib.suppress(OSError):
        content = os.pread(record, 1, 0)
        return int(content) if content.isdigit() else 0
    return 0
