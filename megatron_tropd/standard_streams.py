"""Standard output and standard error that are closed, full, or have lost their reader: one message, or none."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from typing import TextIO

EXIT_NOT_PRINTED = 1


class OutputError(OSError):
    """What the user asked for cannot be printed."""

    exit_code = EXIT_NOT_PRINTED

    def __str__(self) -> str:
        return str(self.strerror)


def open_closed() -> None:
    """Open the null device for every standard stream that is closed (``>&-``).

    Python has None there, and the system would give the number to the next file or socket, which would then receive
    what a library prints.
    """
    for number in range(3):
        if not _is_open(number):
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
            assert nowhere == number
            os.set_inheritable(nowhere, True)  # for the programs that this one starts
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def print_result(text: str, *, end: str = "\n") -> None:
    """Print to standard output.

    Raises:
        OutputError: it cannot be written; the stream is silent from then on.
    """
    try:
        print(text, end=end, flush=True)
    except OSError as error:
        silence(sys.stdout)
        reason = "its reader has gone away" if error.errno == errno.EPIPE else os.strerror(error.errno or 0)
        raise OutputError(error.errno or 0, f"standard output cannot be written: {reason}") from error


def tell(text: str, stream: TextIO | None = None) -> None:
    """Print to standard error (or ``stream``), if that can be written: it is about work that matters more."""
    stream = sys.stderr if stream is None else stream
    try:
        print(text, file=stream, flush=True)
    except (OSError, ValueError):  # full, or closed
        silence(stream)


def silence(stream: TextIO) -> None:
    """Redirect a standard stream that cannot be written to the null device.  What is left in its buffer would fail
    again when Python ends, which then has exit code 120."""
    if stream not in (sys.stdout, sys.stderr):
        return
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
