"""Refuse checkpoints that would run code when they are read.

torch.distributed.checkpoint unpickles ``.metadata`` and every non-tensor object without restriction.  Both are
therefore first read here, with an allow-list, so that a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject

from megatron_tropd.parallel.platform import COMMON_FILE, COMMON_OBJECT

METADATA_FILE = ".metadata"

_DCP = "torch.distributed.checkpoint."
_METADATA_CLASSES = (
    "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
    "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
)  # fmt: skip
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    (_DCP + "filesystem", "_StorageInfo"),
    *((_DCP + "metadata", name) for name in _METADATA_CLASSES),
    *((_DCP + "planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}


class UnsafeCheckpoint(ValueError):
    """A checkpoint file refers to code, or holds objects other than plain data."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UnsafeCheckpoint(f"{METADATA_FILE} refers to {module}.{name}, which a checkpoint does not need")


def read_dcp_metadata(directory: Path) -> Any:
    """Read the ``.metadata`` of a torch_dist checkpoint (a torch.distributed.checkpoint ``Metadata``).

    Raises:
        UnsafeCheckpoint: it refers to anything outside the allow-list.
        ValueError: it is missing or damaged.
    """
    path = directory / METADATA_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; the checkpoint is incomplete")
    try:
        return _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
    except UnsafeCheckpoint as error:
        raise UnsafeCheckpoint(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is damaged: {error!r}") from error


def _load_plain(stream: io.BytesIO | Path, what: str) -> Any:
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types
        raise UnsafeCheckpoint(f"{what} is damaged or holds more than plain data: {error}") from error


def check_pickles(directory: Path) -> None:
    """Check that loading the checkpoint in ``directory`` unpickles only plain data.

    Raises:
        UnsafeCheckpoint, ValueError: a file is missing, damaged or refers to other code.
    """
    metadata = read_dcp_metadata(directory)
    common = directory / COMMON_FILE
    if common.is_file():
        _load_plain(common, str(common))
    elif not any(name.startswith(COMMON_OBJECT) for name in metadata.state_dict_metadata):
        raise ValueError(f"{common} is missing; the checkpoint is incomplete")
    for index, place in (metadata.storage_data or {}).items():
        if hasattr(metadata.state_dict_metadata.get(index.fqn), "chunks"):
            continue  # a tensor: torch itself reads it with weights_only
        with (directory / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            _load_plain(io.BytesIO(stream.read(place.length)), f"{directory}: object {index.fqn}")


def common_part(state_dict: Any) -> Any:
    """Return the part of ``state_dict`` that is not sharded but saved: the content of :data:`COMMON_FILE`."""
    _, common = extract_matching_values(state_dict, lambda value: isinstance(value, ShardedBase))
    _, common = extract_matching_values(common, lambda value: isinstance(value, LocalNonpersistentObject))  # not saved
    return common


def check_plain(state_dict: Any) -> None:
    """Refuse to save what :func:`check_pickles` would refuse to load.

    Raises:
        UnsafeCheckpoint: a non-tensor value is not plain data; the message names its type.
    """
    sharded, _ = extract_matching_values(state_dict, lambda value: isinstance(value, ShardedBase))
    values = [("the common state", common_part(state_dict))]
    values += [(f"object {o.key}", o.data) for o in nested_values(sharded) if isinstance(o, ShardedObject)]
    for what, value in values:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        buffer.seek(0)
        _load_plain(buffer, what)
