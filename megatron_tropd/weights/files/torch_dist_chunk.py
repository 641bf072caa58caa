"""Read the header of one tensor in the format of ``torch.save``, without loading the tensor.

The format is a zip file that holds a pickle, which describes how the tensor lies in its storage, and the storage
itself, uncompressed.  The elements are therefore a plain range of bytes of the file.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

from megatron_tropd.json_files import shown
from megatron_tropd.weights.files.byte_ranges import FileRanges
from megatron_tropd.weights.files.plain_pickle import PickleFault
from megatron_tropd.weights.files.saved_objects import SavedTensor, read_saved

_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and extra field


class TorchDistError(ValueError):
    """A torch_dist checkpoint lacks data that was to be read, or is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """Where an item of a checkpoint lies."""

    file: str
    offset: int
    length: int


class _Window(io.RawIOBase):
    """A range of a file that ``zipfile`` can read as a separate file."""

    def __init__(self, ranges: FileRanges, span: ByteRange) -> None:
        self._ranges, self._range, self._position = ranges, span, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._range.length}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._range.length - self._position)
        data = self._ranges.read(
            self._range.file, self._range.offset + self._position, left if size < 0 else min(size, left)
        )
        self._position += len(data)
        return data


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHeader:
    """A chunk's header: where its storage begins in the file and how the tensor lies in it."""

    offset: int
    tensor: SavedTensor


def read_header(ranges: FileRanges, span: ByteRange) -> ChunkHeader:
    """Read the header of the chunk at ``span``.

    Raises:
        TorchDistError: it is not one plain, uncompressed, little-endian tensor.
    """
    try:
        saved = read_saved(_Window(ranges, span), span.length)  # type: ignore[arg-type]  # what zipfile calls is there
        tensor = saved.content
        if not isinstance(tensor, SavedTensor):
            raise PickleFault(f"it holds {shown(tensor)}; expected a tensor")
        start = span.offset + saved.members[f"data/{tensor.key}"].header_offset
        local = ranges.read(span.file, start, _LOCAL_HEADER_BYTES)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        return ChunkHeader(offset=start + _LOCAL_HEADER_BYTES + names, tensor=tensor)
    except (PickleFault, OSError) as error:
        raise TorchDistError(f"{span.file}, byte {span.offset}: the chunk is damaged: {error}") from error
