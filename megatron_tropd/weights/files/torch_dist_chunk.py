"""Read the header of one tensor in the format of ``torch.save``, without loading the tensor.

The format is a zip file that holds a pickle, which describes how the tensor lies in its storage, and the storage
itself, uncompressed.  The elements are therefore a plain range of bytes of the file.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tropd.weights.coordinates.hf_shapes import Index
from megatron_tropd.weights.files.byte_ranges import FileRanges

_LOCAL_HEADER_BYTES = 30  # of a zip member, before its name and extra field
_STORAGE_DTYPES = {
    "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
}  # fmt: skip


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
    dtype: torch.dtype
    first: int
    shape: Index
    stride: Index

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie row by row without holes."""
        dense = itertools.accumulate(reversed(self.shape[1:]), lambda a, b: a * b, initial=1)
        return all(n == 1 or s == d for n, s, d in zip(reversed(self.shape), reversed(self.stride), dense, strict=True))


def _rebuild(storage: Any, first: int, shape: Sequence[int], stride: Sequence[int], *_: Any) -> tuple:
    return storage, first, tuple(shape), tuple(stride)


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles the description of one tensor, and refuses every class that a plain tensor does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        raise TorchDistError(f"a chunk refers to {module}.{name}, which a plain tensor does not need")

    def persistent_load(self, pid: Any) -> Any:
        _, dtype, key, _, _ = pid
        return dtype, key


def read_header(ranges: FileRanges, span: ByteRange) -> ChunkHeader:
    """Read the header of the chunk at ``span``.

    Raises:
        TorchDistError: it is not one plain, uncompressed, little-endian tensor.
    """
    try:
        with zipfile.ZipFile(_Window(ranges, span)) as archive:
            members = {info.filename.split("/", 1)[1]: info for info in archive.infolist()}
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise TorchDistError("its numbers are big-endian")
            pickled = io.BytesIO(archive.read(members["data.pkl"]))
            (dtype, key), first, shape, stride = _TensorUnpickler(pickled).load()
            member = members[f"data/{key}"]
        if member.compress_type != zipfile.ZIP_STORED:
            raise TorchDistError("its storage is compressed")
        start = span.offset + member.header_offset
        local = ranges.read(span.file, start, _LOCAL_HEADER_BYTES)
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        offset = start + _LOCAL_HEADER_BYTES + names
        return ChunkHeader(offset=offset, dtype=dtype, first=first, shape=shape, stride=stride)
    except TorchDistError as error:
        raise TorchDistError(f"{span.file}, byte {span.offset}: {error}") from None
    except Exception as error:  # a damaged archive or pickle may raise anything
        raise TorchDistError(f"{span.file}, byte {span.offset}: the chunk is damaged: {error!r}") from error
