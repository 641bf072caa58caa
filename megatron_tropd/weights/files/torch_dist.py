"""Read and write torch_dist, the format of Megatron's ``dist_checkpointing``, chunk by chunk, without ever
holding a model in memory.

A checkpoint consists of ``.metadata`` (a pickled torch.distributed.checkpoint ``Metadata``: every global tensor,
its chunks, and the byte range of each) and ``.distcp`` files, which hold each chunk in the format of
``torch.save`` (``torch_dist_chunk.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import pickle
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tropd.atomic_files import CannotWrite, cannot_write, writing
from megatron_tropd.weights.coordinates.hf_shapes import Index
from megatron_tropd.weights.files.byte_ranges import FileRanges
from megatron_tropd.weights.files.torch_dist_chunk import ByteRange, TorchDistError, read_header

METADATA_FILE = ".metadata"
_HEADERS_KEPT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A rectangle of a global tensor and where it is stored."""

    key: str
    start: Index
    size: Index
    span: ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """The file that one process wrote, and where its chunks and objects are in it."""

    name: str
    nbytes: int
    sha256: str
    chunks: tuple[Chunk, ...]
    objects: Mapping[str, ByteRange]
    """Values that are not tensors, by key."""


class ChunkFile:
    """The ``.distcp`` file of one process: data is appended and hashed; closing makes the file durable."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._name = f"__{rank}_0.distcp"
        self._path = folder / self._name
        with writing(self._path):
            self._stream = self._path.open("wb")
        self._failed: CannotWrite | None = None
        self._digest = hashlib.sha256()
        self._written = 0
        self._chunks: list[Chunk] = []
        self._objects: dict[str, ByteRange] = {}

    def write(self, data: bytes | memoryview) -> int:
        """Append raw bytes (part of the file interface that ``torch.save`` uses)."""
        self._digest.update(data)
        try:
            count = self._stream.write(data)
        except OSError as error:
            self._failed = cannot_write(self._path, error)
            raise self._failed from error
        self._written += count
        return count

    def flush(self) -> None:
        """Do nothing (part of the file interface that ``torch.save`` uses); :meth:`close` flushes."""

    def _since(self, offset: int) -> ByteRange:
        return ByteRange(file=self._name, offset=offset, length=self._written - offset)

    def add(self, key: str, start: Index, tensor: Tensor) -> None:
        """Store ``tensor`` as the rectangle of global tensor ``key`` that begins at ``start``."""
        offset = self._written
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()  # torch.save would write the whole storage of a view
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]  # write() and flush() are all it calls
        except RuntimeError as error:  # of its writer in C++, which does not tell of ours
            raise self._failed or error from error
        self._chunks.append(Chunk(key=key, start=start, size=tuple(tensor.shape), span=self._since(offset)))

    def add_object(self, key: str, data: bytes) -> None:
        """Store the serialized bytes of a value that is not a tensor."""
        offset = self._written
        self.write(data)
        self._objects[key] = self._since(offset)

    def close(self) -> WrittenFile:
        """Make the file durable, close it and return what was written."""
        with writing(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        return WrittenFile(
            name=self._name,
            nbytes=self._written,
            sha256=self._digest.hexdigest(),
            chunks=tuple(self._chunks),
            objects=dict(self._objects),
        )

    def abandon(self) -> None:
        """Close the file without making it durable."""
        with contextlib.suppress(OSError):  # it tries once more to write what could not be written
            self._stream.close()


def make_metadata(files: Iterable[WrittenFile], tensors: Mapping[str, tuple[Index, torch.dtype]]) -> Metadata:
    """Return the ``.metadata`` of ``files``, whose global tensors have these shapes and dtypes."""
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])
        for key, (shape, dtype) in tensors.items()
    }
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        for chunk in file.chunks:
            start, span = torch.Size(chunk.start), chunk.span
            entries[chunk.key].chunks.append(ChunkStorageMetadata(start, torch.Size(chunk.size)))
            storage[MetadataIndex(chunk.key, start)] = _StorageInfo(span.file, span.offset, span.length)
        for key, span in file.objects.items():
            entries[key] = BytesStorageMetadata()
            storage[MetadataIndex(key)] = _StorageInfo(span.file, span.offset, span.length)
    return Metadata(entries, storage_data=storage, storage_meta=StorageMeta())


def write_metadata(folder: Path, metadata: Metadata) -> None:
    """Write ``.metadata``; the caller makes it durable."""
    with writing(folder / METADATA_FILE):
        (folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Index:
    """The chunks of one global tensor, sorted by start.

    Layers are stacked along the first dimension, so an index along it selects few chunks.
    """

    chunks: list[Chunk]
    firsts: list[int]
    longest: int

    def near(self, start: int, stop: int) -> list[Chunk]:
        """Return the chunks that may touch the first indices from ``start`` to ``stop``."""
        low, high = bisect_left(self.firsts, start - self.longest + 1), bisect_left(self.firsts, stop)
        return self.chunks[low:high]


def _index(key: str, parts: Iterable[ChunkStorageMetadata], storage: Mapping[Any, Any]) -> _Index:
    chunks = [
        Chunk(key=key, start=tuple(p.offsets), size=tuple(p.sizes), span=_range(storage, MetadataIndex(key, p.offsets)))
        for p in parts
    ]
    chunks.sort(key=lambda chunk: chunk.start)
    return _Index(
        chunks=chunks,
        firsts=[chunk.start[0] if chunk.start else 0 for chunk in chunks],
        longest=max((chunk.size[0] for chunk in chunks if chunk.size), default=1),
    )


class TorchDistReader:
    """Reads rectangles of the global tensors of a checkpoint.

    Of a chunk that a rectangle touches, it reads whole rows (the whole chunk if that is not contiguous).

    Args:
        folder: The checkpoint.
        metadata: Its ``.metadata``, read by ``checkpoints/safety.py``, which unpickles plain data only.
    """

    def __init__(self, folder: str | Path, metadata: Metadata) -> None:
        self._ranges = FileRanges(folder)
        self.tensors: dict[str, tuple[Index, torch.dtype]] = {}
        """Shape and dtype of every global tensor."""
        self.objects: dict[str, ByteRange] = {}
        """Values that are not tensors."""
        storage = metadata.storage_data or {}
        self._chunks: dict[str, _Index] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                self.tensors[key] = (tuple(entry.size), entry.properties.dtype)
                self._chunks[key] = _index(key, entry.chunks, storage)
            else:
                self.objects[key] = _range(storage, MetadataIndex(key))
        self._header = lru_cache(_HEADERS_KEPT)(lambda span: read_header(self._ranges, span))

    def close(self) -> None:
        """Close the files."""
        self._ranges.close()

    def read_object(self, key: str) -> bytes:
        """Return the serialized bytes of a value that is not a tensor."""
        span = self.objects[key]
        return self._ranges.read(span.file, span.offset, span.length)

    def read_into(self, key: str, start: Index, target: Tensor) -> None:
        """Fill ``target`` with the rectangle of its shape that begins at ``start``, cast to its dtype.

        Raises:
            TorchDistError: the chunks do not hold all of it, or a chunk is damaged.
        """
        if key not in self._chunks:
            raise TorchDistError(f"the checkpoint has no tensor {key}")
        found = 0
        for chunk in self._chunks[key].near(start[0], start[0] + target.shape[0]):
            low = [max(a, b) for a, b in zip(start, chunk.start, strict=True)]
            ends = zip(start, target.shape, chunk.start, chunk.size, strict=True)
            extent = [min(s + n, c + m) - at for (s, n, c, m), at in zip(ends, low, strict=True)]
            if min(extent) < 1:
                continue
            part = target[tuple(slice(at - s, at - s + n) for at, s, n in zip(low, start, extent, strict=True))]
            self._copy(chunk, [at - c for at, c in zip(low, chunk.start, strict=True)], part)
            found += part.numel()
        if found != target.numel():
            raise TorchDistError(
                f"{key}: the chunks hold {found} of the {target.numel()} elements of {list(target.shape)} "
                f"at {list(start)}"
            )

    def _copy(self, chunk: Chunk, start: Sequence[int], target: Tensor) -> None:
        offset, header = (found := self._header(chunk.span)).offset, found.tensor
        if header.shape != chunk.size:
            raise TorchDistError(f"{chunk.key}: a chunk of {list(chunk.size)} holds a tensor of {list(header.shape)}")
        size, item = list(target.shape), header.dtype.itemsize
        if not header.is_contiguous:
            raw = torch.empty(header.span, dtype=header.dtype)
            self._ranges.read_into(chunk.span.file, offset + header.first * item, raw)
            whole = raw.as_strided(header.shape, header.stride)
            target.copy_(whole[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))])
            return
        # One range of bytes from the first wanted element to the last: whole rows of the chunk.
        outer = next((d for d, n in enumerate(size) if n > 1), len(size) - 1)
        row = math.prod(header.shape[outer + 1 :])
        before = sum(s * math.prod(header.shape[d + 1 :]) for d, s in enumerate(start[: outer + 1]))
        shape = (size[outer], *header.shape[outer + 1 :])
        direct = target.dtype == header.dtype and target.is_contiguous() and target.numel() == size[outer] * row
        raw = target.view(shape) if direct else torch.empty(shape, dtype=header.dtype)
        self._ranges.read_into(chunk.span.file, offset + (header.first + before) * item, raw)
        if not direct:
            rest = tuple(slice(s, s + n) for s, n in zip(start[outer + 1 :], size[outer + 1 :], strict=True))
            target.copy_(raw[(slice(None), *rest)].view(size) if rest else raw.view(size))


def _range(storage: Mapping[Any, Any], index: MetadataIndex) -> ByteRange:
    info = storage.get(index)
    if info is None:
        raise TorchDistError(f"{METADATA_FILE} does not say where {index.fqn} at {index.offset} lies")
    if info.transform_descriptors:
        raise TorchDistError(f"{index.fqn} is stored with {info.transform_descriptors}, which is not supported")
    if Path(info.relative_path).name != info.relative_path:
        raise TorchDistError(f"{METADATA_FILE} names {info.relative_path!r}, which is not a plain file name")
    return ByteRange(file=info.relative_path, offset=info.offset, length=info.length)
