"""What the ``.metadata`` of a torch_dist checkpoint has to look like, before Megatron or torch works with it.

torch trusts it: sizes become allocations, and names of files are joined to the folder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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
from torch.distributed.checkpoint.planner import SavePlan

from megatron_tropd.json_files import printable, shown
from megatron_tropd.plain_names import plain_name_fault

_MAX_EXTENT, _MAX_DIMENSIONS = 2**48, 64


class StructureFault(ValueError):
    """The ``.metadata`` does not describe a checkpoint; the message says what of it is wrong."""


def check_structure(metadata: object, folder: Path) -> Metadata:
    """Return ``metadata`` if it describes a checkpoint whose files are in ``folder``.

    Types are compared exactly: torch asks for them when it decides which values it unpickles.

    Raises:
        StructureFault: it has values of other types, or names what is not there.
    """
    if type(metadata) is not Metadata:
        raise StructureFault(f"it holds {shown(metadata)}; expected the metadata of torch.distributed.checkpoint")
    entries: Mapping[str, object] = _field(metadata, "state_dict_metadata", dict, "the metadata")
    storage = _field(metadata, "storage_data", dict, "the metadata")
    _field(metadata, "planner_data", (type(None), dict), "the metadata")
    _field(metadata, "storage_meta", (type(None), StorageMeta), "the metadata")
    if not all(type(plan) is SavePlan for plan in _field(metadata, "all_local_plans", (type(None), list), "") or ()):
        raise StructureFault("all_local_plans holds something else than plans of a save")
    sizes: dict[str, int] = {}
    for index, place in storage.items():
        _check_index(index, entries)
        _check_place(index.fqn, place, folder, sizes)
    for name, entry in entries.items():
        if type(name) is str and type(entry) is BytesStorageMetadata:
            _place_of(storage, name, None)
        elif type(name) is str and type(entry) is TensorStorageMetadata:
            _check_tensor(name, entry, storage)
        else:
            raise StructureFault(f"{shown(name)} is {shown(entry)}; expected a tensor or bytes under a name")
    return metadata


def _field(record: object, name: str, kinds: type | tuple[type, ...], what: str) -> Any:
    """Return a field of a record, which must be exactly of one of ``kinds``."""
    value = getattr(record, name, None)
    allowed = kinds if isinstance(kinds, tuple) else (kinds,)
    if type(value) not in allowed:
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in allowed)
        raise StructureFault(f"{what}: {name} is {shown(value)}; expected {expected}")
    return value


def _extents(record: object, name: str, what: str) -> tuple[int, ...]:
    """Return a field of a record that is a size or a place in a tensor."""
    value: tuple[int, ...] = _field(record, name, (torch.Size, tuple), what)
    if len(value) > _MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= _MAX_EXTENT for n in value):
        raise StructureFault(f"{what}: {name} is {shown(value)}; expected up to {_MAX_DIMENSIONS} whole numbers from 0")
    return value


def _check_index(index: object, entries: Mapping[str, object]) -> None:
    name = getattr(index, "fqn", None)
    if type(index) is not MetadataIndex or not isinstance(name, str) or name not in entries:
        raise StructureFault(f"it says where {printable(name)} lies, which it does not describe")
    if index.offset is not None:
        _extents(index, "offset", f"the place of {printable(index.fqn)}")


def _check_place(name: str, place: object, folder: Path, sizes: dict[str, int]) -> None:
    """Check that a value lies inside a file of the folder; ``sizes`` are those of the files seen so far."""
    what = f"the place of {printable(name)}"
    if type(place) is not _StorageInfo:
        raise StructureFault(f"{what} is {shown(place)}; expected file, offset and length")
    file = _field(place, "relative_path", str, what)
    if fault := plain_name_fault(file):
        raise StructureFault(f"{what}: it names {fault}")
    offset, length = _field(place, "offset", int, what), _field(place, "length", int, what)
    if getattr(place, "transform_descriptors", None):
        raise StructureFault(f"{what}: its bytes are transformed, which is not supported")
    if file not in sizes:
        path = folder / file
        if path.is_symlink() or not path.is_file():
            raise StructureFault(f"{what}: {shown(file)} is no file in the folder of the checkpoint")
        sizes[file] = path.stat().st_size
    if offset < 0 or length < 0 or offset + length > sizes[file]:
        raise StructureFault(
            f"{what}: bytes {shown(offset)} to {shown(offset + length)} of {shown(file)}, which has {sizes[file]}"
        )


def _check_tensor(name: str, entry: TensorStorageMetadata, storage: Mapping[Any, Any]) -> None:
    what = f"tensor {printable(name)}"
    dtype = _field(_field(entry, "properties", TensorProperties, what), "dtype", torch.dtype, what)
    size, elements = _extents(entry, "size", what), 0
    for chunk in _field(entry, "chunks", list, what):
        if type(chunk) is not ChunkStorageMetadata:
            raise StructureFault(f"{what}: chunks holds {shown(chunk)}; expected chunks")
        start, extent = _extents(chunk, "offsets", what), _extents(chunk, "sizes", what)
        if len({len(size), len(start), len(extent)}) > 1 or any(
            a + n > whole for a, n, whole in zip(start, extent, size, strict=True)
        ):
            raise StructureFault(f"{what} of size {list(size)} has a chunk of size {list(extent)} at {list(start)}")
        elements += math.prod(extent)
        if math.prod(extent) * dtype.itemsize > _place_of(storage, name, chunk.offsets).length:
            raise StructureFault(f"{what}: a chunk of size {list(extent)} is larger than its bytes in the file")
    if elements != math.prod(size):
        raise StructureFault(f"{what} of size {list(size)} has {elements} elements in its chunks")


def _place_of(storage: Mapping[Any, Any], name: str, start: Any) -> Any:
    place = storage.get(MetadataIndex(name, start))
    if place is None:
        raise StructureFault(f"it does not say where {printable(name)}{f' at {list(start)}' if start else ''} lies")
    return place
