"""What a file of ``torch.save`` holds, without loading it.

The format is a zip file with a pickle, in which tensors are places in storages, and the storages, uncompressed.
Reading only the pickle shows whether loading it builds plain data, in memory that the size of the file justifies.
"""

from __future__ import annotations

import itertools
import math
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import torch

from megatron_tropd.json_files import shown, whole_number
from megatron_tropd.weights.coordinates.hf_shapes import Index
from megatron_tropd.weights.files.plain_pickle import PickleFault, load_plain

_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensor:
    """How a tensor lies in a storage, in elements."""

    key: str
    """The storage is the member ``data/KEY`` of the zip file."""
    dtype: torch.dtype
    first: int
    shape: Index
    stride: Index

    @property
    def span(self) -> int:
        """Elements from the first to the last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if 0 not in self.shape else 0

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie row by row without holes."""
        dense = itertools.accumulate(reversed(self.shape[1:]), lambda a, b: a * b, initial=1)
        return all(n == 1 or s == d for n, s, d in zip(reversed(self.shape), reversed(self.stride), dense, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedFile:
    """An opened file of ``torch.save``."""

    content: Any
    """What the pickle holds, with a :class:`SavedTensor` for each tensor."""
    members: dict[str, zipfile.ZipInfo]
    """The members of the zip file, by their names without the folder that all are in."""


def read_saved(stream: IO[bytes], size: int) -> SavedFile:
    """Read the pickle of a file of ``torch.save`` that has ``size`` bytes.

    Raises:
        PickleFault: it is damaged, holds more than plain data and tensors, is compressed, or says it is larger.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            members = _members(archive, size)
            if (order := members.get("byteorder")) and archive.read(order) != b"little":
                raise PickleFault("its numbers are big-endian")
            if "data.pkl" not in members:
                raise PickleFault("it is no file of torch.save: the zip file has no data.pkl")
            pickled = archive.read(members["data.pkl"])
    except PickleFault:
        raise
    except Exception as error:  # zipfile raises many types for a damaged archive
        raise PickleFault(f"it is no zip file as torch.save writes it, or a damaged one ({error})") from error

    def storage(pid: Any) -> tuple[torch.dtype, str, int]:
        return _storage(pid, members)

    return SavedFile(content=load_plain(pickled, _GLOBALS, storage), members=members)


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise PickleFault("it is compressed, which torch.save does not do")
    if sum(info.file_size for info in infos) > size:
        raise PickleFault("its parts are larger than all of it")
    members = {info.filename.partition("/")[2]: info for info in infos}
    if len({name.lower() for name in members}) != len(infos):
        raise PickleFault("two of its parts have one name")
    return members


def _storage(pid: Any, members: dict[str, zipfile.ZipInfo]) -> tuple[torch.dtype, str, int]:
    """Return (dtype, key, number of elements) of a storage, which is in the file and not larger than it says."""
    if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], torch.dtype):
        raise PickleFault(f"it refers to {shown(pid)}, which is no storage of a tensor")
    _, dtype, key, _, count = pid
    member = members.get(f"data/{key}") if isinstance(key, str) else None
    elements = _whole(count, "the length of a storage")
    if member is None or elements * dtype.itemsize > member.file_size:
        has = f"{member.file_size} bytes" if member else "nothing"
        raise PickleFault(f"storage {shown(key)} should have {elements * dtype.itemsize} bytes, and has {has}")
    return dtype, key, elements


def _whole(value: object, what: str) -> int:
    try:
        return whole_number(value, what)
    except ValueError as error:
        raise PickleFault(str(error)) from None


def _tensor(storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> SavedTensor:
    """Stand for torch's function that makes a tensor from a part of a storage."""
    if not isinstance(storage, tuple) or not isinstance(shape, Sequence) or not isinstance(stride, Sequence):
        raise PickleFault(f"a tensor has the storage {shown(storage)}, size {shown(shape)} and stride {shown(stride)}")
    if len(shape) != len(stride) or len(shape) > _MAX_DIMENSIONS:
        raise PickleFault(f"a tensor has {len(shape)} sizes and {len(stride)} strides")
    dtype, key, elements = storage
    tensor = SavedTensor(
        key=key, dtype=dtype, first=_whole(first, "the start of a tensor"),
        shape=tuple(_whole(extent, "a size of a tensor") for extent in shape),
        stride=tuple(_whole(step, "a stride of a tensor") for step in stride),
    )  # fmt: skip
    if tensor.first + tensor.span > elements or math.prod(tensor.shape) > 2**62:
        raise PickleFault(f"a tensor of size {shown(tensor.shape)} does not fit a storage of {elements} elements")
    return tensor


def _encoded(text: Any, encoding: Any) -> bytes:
    """Stand for the function by which pickles of the older protocols hold bytes."""
    if not isinstance(text, str) or encoding != "latin1":
        raise PickleFault(f"it encodes {shown(text)} as {shown(encoding)}")
    return text.encode("latin1")


_GLOBALS: dict[tuple[str, str], object] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("_codecs", "encode"): _encoded,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    **{
        (str(dtype).partition(".")[0], str(dtype).partition(".")[2]): dtype
        for dtype in (*_STORAGES.values(), torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)
    },
}
