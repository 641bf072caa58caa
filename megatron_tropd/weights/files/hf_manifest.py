"""A record of the files of an HF checkpoint, without their data, so that they can be written again byte for byte."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.json_files import as_dataclass, parse_json_object, shown
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.plain_names import plain_name_fault
from megatron_tropd.weights.coordinates.hf_shapes import EMBED_TOKENS, LM_HEAD, hf_shapes
from megatron_tropd.weights.files.hf_checkpoint import INDEX_FILE, SINGLE_FILE, HfCheckpoint, parse_index
from megatron_tropd.weights.files.safetensors_header import (
    FileHeader,
    HfCheckpointError,
    TensorInfo,
    make_header,
    parse_header,
)

MANIFEST_FILE = "hf_manifest.json"
FORMAT = 1
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """The fields of the manifest file."""

    files: Mapping[str, str]
    """The header of each file."""
    index: Mapping[str, str] | None
    sha256: Mapping[str, str]
    vocab_size: int
    padded_vocab_size: int | None
    left_aside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HfManifest:
    """The files of a checkpoint without their data.

    It keeps each file's header as text, so that order, metadata, dtypes and padding are written as they were
    read, whatever program wrote the source.
    """

    headers: dict[str, FileHeader]
    index_text: str | None
    sha256: dict[str, str]
    """Digest of each tensor's bytes; empty if none was recorded or the weights are no longer the source's."""
    vocab_size: int
    padded_vocab_size: int | None = None
    left_aside: tuple[str, ...] = ()
    """Tensors that the source had and the files of this manifest do not have."""

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of every file."""
        return {name: info for header in self.headers.values() for name, info in header.tensors.items()}

    @classmethod
    def of(
        cls, checkpoint: HfCheckpoint, *, sha256: Mapping[str, str] | None = None, padded_vocab_size: int | None = None
    ) -> HfManifest:
        """Return the manifest of an opened checkpoint, without the tensors that it leaves aside."""
        headers, index_text = dict(checkpoint.headers), checkpoint.index_text
        if aside := checkpoint.left_aside:
            kept = {file: header for file, header in headers.items() if header.tensors.keys() - aside.keys()}
            headers = {file: header.without(aside.keys(), file) for file, header in kept.items()}
            index_text = _index_without(index_text, aside.keys(), headers) if index_text is not None else None
        return cls(
            headers=headers,
            index_text=index_text,
            sha256=dict(sha256 or {}),
            vocab_size=checkpoint.arch.vocab_size,
            padded_vocab_size=padded_vocab_size,
            left_aside=tuple(aside),
        )

    @classmethod
    def default(
        cls, arch: Architecture, dtype: torch.dtype, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES
    ) -> HfManifest:
        """Return a manifest for weights that have none: one file, or several files with an index."""
        shards: list[dict[str, tuple[int, ...]]] = [{}]
        filled = 0
        for name, shape in hf_shapes(arch).items():
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            if shards[-1] and filled + nbytes > max_shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = shape
            filled += nbytes
        if len(shards) == 1:
            headers = {SINGLE_FILE: make_header(shards[0], dtype, SINGLE_FILE)}
            return cls(headers=headers, index_text=None, sha256={}, vocab_size=arch.vocab_size)
        files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        headers = {file: make_header(shard, dtype, file) for file, shard in zip(files, shards, strict=True)}
        index = {
            "metadata": {"total_size": sum(header.data_bytes for header in headers.values())},
            "weight_map": {name: file for file in files for name in sorted(headers[file].tensors)},
        }
        return cls(
            headers=headers, index_text=json.dumps(index, indent=2) + "\n", sha256={}, vocab_size=arch.vocab_size
        )

    def aliases(self, arch: Architecture) -> dict[str, str]:
        """Return (copy -> original) for tensors written as copies of another: a tied head that the source stored."""
        return {LM_HEAD: EMBED_TOKENS} if arch.tie_word_embeddings and LM_HEAD in self.tensors else {}

    def without_digests(self) -> HfManifest:
        """Return the same manifest without digests, for weights with other values."""
        return replace(self, sha256={})

    def check(self, arch: Architecture) -> None:
        """Raise HfCheckpointError unless the manifest lists exactly the tensors of ``arch``."""
        expected = hf_shapes(arch)
        listed = {name: info.shape for name, info in self.tensors.items() if name not in self.aliases(arch)}
        if listed != expected:
            differing = sorted(k for k in listed.keys() | expected.keys() if listed.get(k) != expected.get(k))
            raise HfCheckpointError(f"{MANIFEST_FILE} is of another model; first difference: {differing[0]}")

    def to_json(self) -> str:
        """Return the text of the manifest file."""
        value: dict[str, Any] = {
            "format": FORMAT,
            "vocab_size": self.vocab_size,
            "padded_vocab_size": self.padded_vocab_size,
            "files": {name: header.text for name, header in self.headers.items()},
            "index": {INDEX_FILE: self.index_text} if self.index_text is not None else None,
            "sha256": self.sha256,
            "left_aside": list(self.left_aside),
        }
        return json.dumps(value, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> HfManifest:
        """Read a manifest from the text of :meth:`to_json`.

        Raises:
            HfCheckpointError: not a manifest of this format.
        """
        try:
            value = parse_json_object(text, "it")
            if (found := value.pop("format", None)) != FORMAT:
                raise ValueError(f"format is {shown(found)}; this version reads {FORMAT}")
            content = as_dataclass(_Content, value, "it")
            if fault := next((fault for name in content.files if (fault := plain_name_fault(name))), ""):
                raise ValueError(f"it names {fault}")
            index_text = content.index.get(INDEX_FILE) if content.index else None
            if index_text is not None:
                parse_index(index_text)
            return cls(
                headers={name: parse_header(header, name) for name, header in content.files.items()},
                index_text=index_text,
                sha256=dict(content.sha256),
                vocab_size=content.vocab_size,
                padded_vocab_size=content.padded_vocab_size,
                left_aside=content.left_aside,
            )
        except ValueError as error:
            raise HfCheckpointError(f"{MANIFEST_FILE} is damaged: {error}") from error

    @classmethod
    def load(cls, directory: str | Path) -> HfManifest | None:
        """Read the manifest in ``directory``; None if it has none."""
        path = Path(directory) / MANIFEST_FILE
        if not path.is_file():
            return None
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise HfCheckpointError(f"{path} is damaged: {error}") from error
        return cls.from_json(text)


def _index_without(text: str, names: Collection[str], headers: Mapping[str, FileHeader]) -> str:
    """Return the index without some tensors, with the size of those that remain."""
    index = json.loads(text)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in names}
    if isinstance(metadata := index.get("metadata"), dict) and "total_size" in metadata:
        metadata["total_size"] = sum(header.data_bytes for header in headers.values())
    return json.dumps(index, indent=2) + "\n"
