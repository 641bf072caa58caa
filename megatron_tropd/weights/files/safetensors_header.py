"""The header of a safetensors file: read and checked without reading the data, or newly made.

A file is: 8 bytes little-endian header length, the header (JSON, padded with spaces), the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.json_files import as_dataclass, parse_json_object, printable, shown
from megatron_tropd.models.hf_config import DEQUANTIZE
from megatron_tropd.weights.files.other_tensors import quantization_of

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The supported dtypes.  Quantized tensors, which need their scales, are refused."""
_MAX_DIMENSIONS = 64
_ENTRY_KEYS = ("dtype", "shape", "data_offsets")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HfCheckpointError(ValueError):
    """An HF checkpoint directory is incomplete, damaged or of another model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where one tensor lies, and its dtype and shape."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the FILE."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileHeader:
    """One safetensors file, without its data."""

    text: str
    """The header exactly as it stands in the file, padding included: writing it again gives the same bytes."""
    tensors: dict[str, TensorInfo]
    data_bytes: int

    def without(self, names: Collection[str], file: str) -> FileHeader:
        """Return the header of the file called ``file`` without some of its tensors; the rest is as it was."""
        entries = json.loads(self.text)
        position = 0
        for name in sorted(self.tensors.keys() - set(names), key=lambda name: self.tensors[name].offset):
            nbytes = self.tensors[name].nbytes
            entries[name]["data_offsets"] = [position, position + nbytes]
            position += nbytes
        return parse_header(_header_text({key: entry for key, entry in entries.items() if key not in names}), file)

    @property
    def prefix(self) -> bytes:
        """The bytes before the data."""
        encoded = self.text.encode()
        return len(encoded).to_bytes(LENGTH_BYTES, "little") + encoded

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.prefix) + self.data_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """What a header says of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, ...]


def _tensor_info(file: str, name: str, value: object, data_start: int) -> TensorInfo:
    known = {key: value[key] for key in _ENTRY_KEYS if key in value} if isinstance(value, Mapping) else value
    name = printable(name)
    entry = as_dataclass(_Entry, known, name)
    kind, shape = entry.dtype, entry.shape
    if kind not in DTYPES:
        remedy = f" ({DEQUANTIZE})" if kind.startswith(("F8", "F4", "I8", "U8")) else ""
        raise ValueError(f"{name} has dtype {printable(kind)}; supported are {', '.join(DTYPES)}{remedy}")
    if len(shape) > _MAX_DIMENSIONS or len(entry.data_offsets) != 2:
        raise ValueError(f"{name} has {len(shape)} dimensions and {len(entry.data_offsets)} data_offsets; expected 2")
    begin, end = entry.data_offsets
    info = TensorInfo(file=file, dtype=DTYPES[kind], shape=shape, offset=data_start + begin, nbytes=end - begin)
    if info.nbytes != math.prod(shape) * info.dtype.itemsize:
        raise ValueError(f"{name} of shape {shown(list(shape))} and dtype {kind} cannot take {info.nbytes} bytes")
    return info


def parse_header(text: str, file: str) -> FileHeader:
    """Parse and check header ``text`` of the file called ``file``.

    Raises:
        HfCheckpointError: not JSON, a name twice, an unsupported dtype, or tensors that overlap or leave holes.
    """
    data_start = LENGTH_BYTES + len(text.encode())
    try:
        entries = parse_json_object(text, f"{file}: the safetensors header is damaged: it")
    except ValueError as error:
        raise HfCheckpointError(str(error)) from error
    try:
        entries.pop("__metadata__", None)
        if method := quantization_of(entries):
            raise ValueError(f"the weights are quantized ({method}), but {DEQUANTIZE}")
        tensors = {name: _tensor_info(file, name, entry, data_start) for name, entry in entries.items()}
    except ValueError as error:
        raise HfCheckpointError(f"{file}: {error}") from error
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != position:
            raise HfCheckpointError(f"{file}: {printable(name)} starts at byte {info.offset}, expected {position}")
        position += info.nbytes
    return FileHeader(text=text, tensors=tensors, data_bytes=position - data_start)


def read_header(path: Path) -> FileHeader:
    """Read and check the header of the file at ``path``.

    Raises:
        HfCheckpointError: as :func:`parse_header`, or the file is shorter or longer than its header says.
    """
    if not path.is_file():
        raise HfCheckpointError(f"{path} is no file; expected a safetensors file")
    actual = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if actual < LENGTH_BYTES or length > min(MAX_HEADER_BYTES, actual - LENGTH_BYTES):
            raise HfCheckpointError(
                f"{path} is not a complete safetensors file: it has {actual} bytes and says its header alone "
                f"takes {length}; download it again"
            )
        raw = stream.read(length)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise HfCheckpointError(f"{path}: the safetensors header is not UTF-8: {error}") from error
    header = parse_header(text, path.name)
    if header.file_bytes != actual:
        raise HfCheckpointError(
            f"{path} is truncated or has trailing bytes: its header says {header.file_bytes} bytes, "
            f"the file has {actual}; download it again"
        )
    return header


def make_header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, file: str) -> FileHeader:
    """Return the header that the safetensors library writes for tensors of one dtype, metadata ``{"format": "pt"}``."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in sorted(shapes):
        nbytes = math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shapes[name]),
            "data_offsets": [position, position + nbytes],
        }
        position += nbytes
    return parse_header(_header_text(entries), file)


def _header_text(entries: Mapping[str, Any]) -> str:
    """Return the header as the safetensors library writes it, padded with spaces."""
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % LENGTH_BYTES)
