"""Refuse checkpoints that would run code when they are read.

torch.distributed.checkpoint unpickles ``.metadata`` and every non-tensor object without restriction.  Both are
therefore first read here, with an allow-list and with limits (``weights/files/plain_pickle.py``), so that a checkpoint
from elsewhere cannot run code or fill the memory.
"""

from __future__ import annotations

import importlib
import io
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_tropd.checkpoints.structure import StructureFault, check_structure
from megatron_tropd.parallel.platform import COMMON_FILE, COMMON_OBJECT
from megatron_tropd.weights.files.plain_pickle import PickleFault, load_plain
from megatron_tropd.weights.files.saved_objects import read_saved

METADATA_FILE = ".metadata"

_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
}  # fmt: skip
ALLOWED: dict[tuple[str, str], object] = {
    **{
        (module, name): getattr(importlib.import_module(module), name)
        for module in _RECORDS
        for name in _RECORDS[module]
    },
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
}
"""What ``.metadata`` may name."""


class UnsafeCheckpoint(ValueError):
    """A checkpoint file refers to code, or holds objects other than plain data."""


def read_dcp_metadata(directory: Path) -> Metadata:
    """Read the ``.metadata`` of a torch_dist checkpoint, and check that it describes one.

    Raises:
        UnsafeCheckpoint: it is damaged, refers to anything outside the allow-list, or would take more memory than its
            size justifies; or what it says is not so.
        ValueError: it is missing or cannot be read.
    """
    path = directory / METADATA_FILE
    if not path.is_file():
        raise ValueError(f"{path} is missing; the checkpoint is incomplete")
    try:
        return check_structure(load_plain(path.read_bytes(), ALLOWED), directory)
    except (PickleFault, StructureFault) as error:
        raise UnsafeCheckpoint(f"{path} is damaged or unsafe: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _check_loads(stream: IO[bytes], size: int, what: str) -> None:
    """Check that ``torch.load`` builds plain data from ``size`` bytes: first its pickle is read, then all is loaded."""
    try:
        read_saved(stream, size)
        stream.seek(0)
        torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types
        reason = " ".join(str(error).split())[:500]
        raise UnsafeCheckpoint(f"{what} is damaged or holds more than plain data: {reason}") from error


def check_pickles(directory: Path) -> None:
    """Check that loading the checkpoint in ``directory`` unpickles only plain data.

    Raises:
        UnsafeCheckpoint, ValueError: a file is missing, damaged or refers to other code.
    """
    metadata = read_dcp_metadata(directory)
    entries = metadata.state_dict_metadata
    common = directory / COMMON_FILE
    if common.is_file():
        with common.open("rb") as stream:
            _check_loads(stream, common.stat().st_size, str(common))
    elif not any(name.startswith(COMMON_OBJECT) for name in entries):
        raise ValueError(f"{common} is missing; the checkpoint is incomplete")
    for index, place in metadata.storage_data.items():
        if type(entries[index.fqn]) is TensorStorageMetadata:
            continue  # torch itself reads it with weights_only
        with (directory / place.relative_path).open("rb") as stream:
            stream.seek(place.offset)
            _check_loads(io.BytesIO(stream.read(place.length)), place.length, f"{directory}: object {index.fqn}")


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
        size = buffer.tell()
        buffer.seek(0)
        _check_loads(buffer, size, what)
