"""Writing HF safetensors files from a manifest: tensors arrive in any order, each is held once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.weights.files import INDEX_FILE
from megatron_tropd.weights.manifest import HfManifest
from megatron_tropd.weights.safetensors_header import HfCheckpointError

TMP_SUFFIX = ".tmp"


def fsync_path(path: str | Path) -> None:
    """Make a file's bytes, or a directory's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(path.name + TMP_SUFFIX)
    with temporary.open("wb") as stream:
        stream.write(text.encode())
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, row-major (little-endian machines only, as safetensors is)."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


def _write_at(path: Path, offset: int, data: memoryview) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def write_hf_files(
    directory: str | Path, manifest: HfManifest, arch: Architecture, tensors: Iterable[tuple[str, Tensor]],
    *, verify: bool,
) -> int:  # fmt: skip
    """Write the safetensors files (and index) that ``manifest`` describes; returns the number of bytes.

    Each tensor is cast to its recorded dtype.  Nothing has its final name before every tensor of every
    file is there; the index comes last.  With ``verify`` the bytes must have the recorded digests.

    Raises:
        HfCheckpointError: a tensor is missing, unknown, repeated, of another shape or of other bytes.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    manifest.check(arch)
    copies: dict[str, list[str]] = {}
    for alias, source in manifest.aliases(arch).items():
        copies.setdefault(source, []).append(alias)
    paths = {file: directory / (file + TMP_SUFFIX) for file in manifest.headers}
    try:
        for file, header in manifest.headers.items():
            with paths[file].open("wb") as stream:
                stream.write(header.prefix)
                stream.truncate(header.file_bytes)
        missing = set(manifest.tensors)
        for source, tensor in tensors:
            for name in (source, *copies.get(source, ())):
                _write_one(name, tensor, manifest, paths, missing, verify)
        if missing:
            raise HfCheckpointError(f"{len(missing)} tensors were never exported, the first is {min(missing)}")
        _publish(directory, manifest, paths)
    except BaseException:
        for path in paths.values():
            path.unlink(missing_ok=True)
        raise
    return sum(header.file_bytes for header in manifest.headers.values())


def _write_one(
    name: str, tensor: Tensor, manifest: HfManifest, paths: dict[str, Path], missing: set[str], verify: bool
) -> None:
    if name not in missing:
        known = name in manifest.tensors
        raise HfCheckpointError(f"{name} was exported twice" if known else f"{name} is not in the manifest")
    info = manifest.tensors[name]
    if tuple(tensor.shape) != info.shape:
        raise HfCheckpointError(f"{name} was exported with shape {list(tensor.shape)}, expected {list(info.shape)}")
    data = tensor_bytes(tensor.to(info.dtype))
    if verify and name in manifest.sha256 and hashlib.sha256(data).hexdigest() != manifest.sha256[name]:
        raise HfCheckpointError(f"{name} does not have the bytes it was converted from; the checkpoint is damaged")
    _write_at(paths[info.file], info.offset, data)
    missing.discard(name)


def _publish(directory: Path, manifest: HfManifest, paths: dict[str, Path]) -> None:
    for file, path in paths.items():
        fsync_path(path)
        os.replace(path, directory / file)
    fsync_path(directory)
    if manifest.index_text is not None:
        replace_text(directory / INDEX_FILE, manifest.index_text)


def remove_other_weights(directory: str | Path, manifest: HfManifest) -> None:
    """Delete safetensors files (and an index) of an earlier model that ``manifest`` does not list."""
    for path in Path(directory).glob("*.safetensors"):
        if path.name not in manifest.headers:
            path.unlink()
    if manifest.index_text is None:
        (Path(directory) / INDEX_FILE).unlink(missing_ok=True)
