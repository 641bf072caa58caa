"""Write HF safetensors files from a manifest: tensors arrive in any order and are written one at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megatron_tropd.atomic_files import writing
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.weights.files.byte_ranges import sha256_of_range, tensor_bytes
from megatron_tropd.weights.files.hf_checkpoint import INDEX_FILE
from megatron_tropd.weights.files.hf_manifest import HfManifest
from megatron_tropd.weights.files.safetensors_header import HfCheckpointError

TMP_SUFFIX = ".tmp"
_NO_SYNC_OF_DIRECTORIES = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""What file systems say that cannot do it, as some of networks and in user space: they order names themselves."""


def fsync_path(path: str | Path) -> None:
    """Make a file's bytes, or a directory's entries where its file system can, durable.

    Raises:
        CannotWrite: they are not.
    """
    with writing(Path(path)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            if not (is_directory and error.errno in _NO_SYNC_OF_DIRECTORIES):
                raise
        finally:
            os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that a reader sees the old text or the new one, never a part."""
    temporary = path.with_name(path.name + TMP_SUFFIX)
    with writing(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    fsync_path(path.parent)


class HfWriter:
    """The safetensors files of a manifest under temporary names; rows of tensors arrive in any order.

    Several processes may each have a writer of the same directory and fill different rows: one of them
    calls :meth:`create` before and :meth:`publish` (or :meth:`discard`) after.
    """

    def __init__(self, directory: str | Path, manifest: HfManifest, arch: Architecture) -> None:
        """Raise HfCheckpointError if the manifest is of another model."""
        manifest.check(arch)
        self.directory, self.manifest = Path(directory), manifest
        self._copies: dict[str, list[str]] = {}
        for alias, source in manifest.aliases(arch).items():
            self._copies.setdefault(source, []).append(alias)
        self._paths = {file: self.directory / (file + TMP_SUFFIX) for file in manifest.headers}

    def names(self, source: str) -> tuple[str, ...]:
        """Return the tensors that get the rows of ``source``: itself, and a tied head that is stored too."""
        return (source, *self._copies.get(source, ()))

    def create(self) -> None:
        """Write the headers and extend the files to their full size."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for file, header in self.manifest.headers.items():
            with writing(self.directory / file), self._paths[file].open("wb") as stream:
                stream.write(header.prefix)
                stream.truncate(header.file_bytes)

    def write_rows(self, source: str, row: int, rows: Tensor) -> memoryview:
        """Write ``rows`` to tensor ``source`` (and its copies) from row ``row`` on; return the bytes as written."""
        info = self.manifest.tensors[source]
        data = tensor_bytes(rows.to(info.dtype))
        for name in self.names(source):
            info = self.manifest.tensors[name]
            with writing(self.directory / info.file), self._paths[info.file].open("r+b") as stream:
                stream.seek(info.offset + row * (info.nbytes // info.shape[0]))
                stream.write(data)
        return data

    def written_sha256(self, name: str) -> str:
        """Return the sha256 of a tensor's bytes in the unpublished file."""
        info = self.manifest.tensors[name]
        return sha256_of_range(self._paths[info.file], info.offset, info.nbytes)

    def check_digest(self, source: str, sha256: str) -> None:
        """Raise HfCheckpointError if the manifest recorded another digest than ``sha256`` for the tensor."""
        for name in self.names(source):
            if self.manifest.sha256.get(name, sha256) != sha256:
                raise HfCheckpointError(
                    f"{name} does not have the bytes it was converted from; the checkpoint is damaged"
                )

    def publish(self) -> int:
        """Give every file its final name and write the index last; return the bytes of the safetensors files."""
        for file, path in self._paths.items():
            with writing(self.directory / file):
                fsync_path(path)
                os.replace(path, self.directory / file)
        fsync_path(self.directory)
        if self.manifest.index_text is not None:
            replace_text(self.directory / INDEX_FILE, self.manifest.index_text)
        return sum(header.file_bytes for header in self.manifest.headers.values())

    def discard(self) -> None:
        """Remove the files that have not been published."""
        for path in self._paths.values():
            with contextlib.suppress(OSError):  # the error that led here matters more
                path.unlink(missing_ok=True)


def write_hf_files(
    directory: str | Path, manifest: HfManifest, arch: Architecture, tensors: Iterable[tuple[str, Tensor]],
    *, verify: bool,
) -> int:  # fmt: skip
    """Write the safetensors files (and index) that ``manifest`` describes; return the bytes of those files.

    Each tensor is cast to its recorded dtype.  No file gets its final name before every tensor of every
    file is written; the index comes last.  With ``verify`` the bytes must have the recorded digests.

    Raises:
        HfCheckpointError: a tensor is missing, unknown, repeated, of another shape or of other bytes.
    """
    writer = HfWriter(directory, manifest, arch)
    try:
        writer.create()
        missing = set(manifest.tensors)
        for name, tensor in tensors:
            _write_one(writer, name, tensor, missing, verify)
        if missing:
            raise HfCheckpointError(f"{len(missing)} tensors were never exported, the first is {min(missing)}")
        return writer.publish()
    except BaseException:
        writer.discard()
        raise


def _write_one(writer: HfWriter, name: str, tensor: Tensor, missing: set[str], verify: bool) -> None:
    manifest = writer.manifest
    if name not in missing:
        known = name in manifest.tensors
        raise HfCheckpointError(f"{name} was exported twice" if known else f"{name} is not in the manifest")
    info = manifest.tensors[name]
    if tuple(tensor.shape) != info.shape:
        raise HfCheckpointError(f"{name} was exported with shape {list(tensor.shape)}, expected {list(info.shape)}")
    data = writer.write_rows(name, 0, tensor)
    if verify:
        writer.check_digest(name, hashlib.sha256(data).hexdigest())
    missing.difference_update(writer.names(name))


def remove_other_weights(directory: str | Path, manifest: HfManifest) -> None:
    """Delete safetensors files (and an index) of an earlier model that ``manifest`` does not list."""
    for path in Path(directory).glob("*.safetensors"):
        if path.name not in manifest.headers:
            path.unlink()
    if manifest.index_text is None:
        (Path(directory) / INDEX_FILE).unlink(missing_ok=True)
