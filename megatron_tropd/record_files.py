"""Files to which a process appends records until it is killed: a cut or damaged one is left out when they are read."""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_HEAD = struct.Struct("<III")
"""Number of the record, number of its bytes and their CRC-32; the bytes follow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record of a file."""

    number: int
    """What its writer gave it."""
    data: bytes
    start: int
    """Where in the file it begins."""


class RecordFile:
    """A file of one writer, made with its first record.  Not locked.

    Args:
        path: of the file; its folder is made too.  Behind a cut record nothing is read, so no file is opened again:
            each writer has a name of its own.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def add(self, records: Iterable[tuple[int, bytes]]) -> None:
        """Append records (number, bytes).

        Raises:
            OSError: they cannot be written; the file may then end in a cut record.
        """
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        for number, data in records:
            self._file.write(_HEAD.pack(number, len(data), zlib.crc32(data)))
            self._file.write(data)
        self._file.flush()

    def delete(self) -> None:
        """Close and delete the file, if it was made; what cannot be deleted stays."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                file.close()  # may write what an earlier failure left in its buffer


def read_records(path: Path) -> Iterator[Record]:
    """Yield the whole records of a file; what a kill left at its end, or a disk has damaged, ends it.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        while (record := _next(file)) is not None:
            yield record


def read_record(path: Path, start: int) -> Record | None:
    """Return the record that begins at ``start``; None if it is damaged.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        file.seek(start)
        return _next(file)


def _next(file: BinaryIO) -> Record | None:
    start = file.tell()
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    number, size, checksum = _HEAD.unpack(head)
    if size > os.fstat(file.fileno()).st_size - file.tell():  # a damaged size may ask for gigabytes
        return None
    data = file.read(size)
    if len(data) < size or zlib.crc32(data) != checksum:
        return None
    return Record(number=number, data=data, start=start)
