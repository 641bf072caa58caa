"""Read Hugging Face checkpoint directories: all headers first, then only the ranges that are needed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_tropd.atomic_files import replacing, writing
from megatron_tropd.json_files import parse_json_object, printable, shown
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.hf_config import CONFIG_FILE, load_architecture
from megatron_tropd.plain_names import plain_name_fault
from megatron_tropd.weights.coordinates.hf_shapes import EMBED_TOKENS, LM_HEAD, hf_shapes
from megatron_tropd.weights.files.byte_ranges import FileRanges, sha256_of_range
from megatron_tropd.weights.files.other_tensors import IGNORE_FLAG, extra_tensors, listed, rotary_buffers
from megatron_tropd.weights.files.safetensors_header import FileHeader, HfCheckpointError, TensorInfo, read_header

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class HfCheckpoint:
    """An opened HF directory whose files are complete and whose tensors have the expected names and shapes."""

    directory: Path
    arch: Architecture
    headers: dict[str, FileHeader]
    """By file name, in name order."""
    index_text: str | None
    """Unchanged text of ``model.safetensors.index.json``, None for a one-file checkpoint."""
    tensors: dict[str, TensorInfo]
    """The weights of the decoder."""
    left_aside: dict[str, TensorInfo]
    """Tensors of the files that are not read: buffers of rotary embeddings, and parts beside the decoder."""
    _ranges: FileRanges = field(repr=False, compare=False)
    _handles: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(
        cls, directory: str | Path, arch: Architecture | None = None, *, ignore_extra: bool = False
    ) -> HfCheckpoint:
        """Read and check the headers.

        Args:
            directory: Hugging Face directory.
            arch: The architecture of the weights; by default what ``config.json`` says.
            ignore_extra: Leave aside known parts beside the decoder (a vision tower, multi-token prediction).

        Raises:
            HfCheckpointError: a file or a tensor is missing or wrong; the message names it.
            FileNotFoundError, ValueError: no usable ``config.json``.
        """
        directory = Path(directory)
        if arch is None:
            arch = load_architecture(directory)
        index_text, headers, tensors = read_headers(directory)
        aside = _left_aside(directory, tensors, ignore_extra=ignore_extra)
        weights = {name: info for name, info in tensors.items() if name not in aside}
        _check_tensors(arch, weights)
        return cls(
            directory=directory, arch=arch, headers=headers, index_text=index_text, tensors=weights,
            left_aside={name: tensors[name] for name in sorted(aside)}, _ranges=FileRanges(directory),
        )  # fmt: skip

    @property
    def widest_dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor exactly: the common one, or fp32 where they differ."""
        dtypes = {info.dtype for info in self.tensors.values()}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    @property
    def has_tied_copy(self) -> bool:
        """Whether the files hold ``lm_head.weight`` although the config ties it to the embedding."""
        return self.arch.tie_word_embeddings and LM_HEAD in self.tensors

    def read(self, name: str, start: Sequence[int] | None = None, size: Sequence[int] | None = None) -> Tensor:
        """Read the rectangle ``size`` at ``start`` of a tensor (default: all), in the file's dtype, on the CPU."""
        info = self.tensors[name]
        start = start if start is not None else (0,) * len(info.shape)
        size = size if size is not None else info.shape
        if any(s < 0 or n < 1 or s + n > full for s, n, full in zip(start, size, info.shape, strict=True)):
            raise IndexError(f"{name} of shape {list(info.shape)} has no box of {list(size)} at {list(start)}")
        if info.file not in self._handles:
            self._handles[info.file] = safe_open(self.directory / info.file, framework="pt", device="cpu")
        view = self._handles[info.file].get_slice(name)
        return view[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]

    def read_rows_into(self, name: str, row: int, target: Tensor) -> None:
        """Fill ``target`` (of the file's dtype) with whole rows from row ``row`` on, without mapping the file."""
        info = self.tensors[name]
        if target.dtype != info.dtype or tuple(target.shape[1:]) != info.shape[1:]:
            raise ValueError(
                f"{name} has {info.dtype} rows of {list(info.shape[1:])}, not {target.dtype} {target.shape}"
            )
        self._ranges.read_into(info.file, info.offset + row * (info.nbytes // info.shape[0]), target)

    def sha256(self, name: str) -> str:
        """Return the sha256 of a tensor's bytes in the file."""
        info = self.tensors[name]
        return sha256_of_range(self.directory / info.file, info.offset, info.nbytes)

    def check_tied_copy(self, start: Sequence[int], size: Sequence[int]) -> None:
        """Compare whole rows of a redundant ``lm_head.weight`` with the embedding it is tied to.

        Raises:
            HfCheckpointError: they differ, so tying would lose one of them.
        """
        if not self.has_tied_copy:
            return
        table, head = (torch.empty(tuple(size), dtype=self.tensors[name].dtype) for name in (EMBED_TOKENS, LM_HEAD))
        self.read_rows_into(EMBED_TOKENS, start[0], table)
        self.read_rows_into(LM_HEAD, start[0], head)
        if table.dtype != head.dtype or not torch.equal(table.view(torch.uint8), head.view(torch.uint8)):
            raise HfCheckpointError(
                f"{self.directory}: config.json says tie_word_embeddings, but {LM_HEAD} differs from {EMBED_TOKENS} "
                f"(rows {start[0]} to {start[0] + size[0] - 1}); set tie_word_embeddings to false or drop {LM_HEAD}"
            )


def read_headers(directory: Path) -> tuple[str | None, dict[str, FileHeader], dict[str, TensorInfo]]:
    """Read what a model of any family has on disk.

    Returns:
        Text of the index (None for a one-file checkpoint), the header of each file, and all tensors by name.

    Raises:
        HfCheckpointError: a file is missing or damaged, or the index and the files disagree.
    """
    index_text, weight_map = _read_index(directory)
    names = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]
    headers = {name: read_header(directory / name) for name in names}
    tensors = _merge(headers)
    if weight_map is not None:
        _check_index(weight_map, tensors)
    return index_text, headers, tensors


def _read_index(directory: Path) -> tuple[str | None, dict[str, str] | None]:
    """Return (text, tensor -> file) of the index; (None, None) for a one-file checkpoint."""
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise HfCheckpointError(
            f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}; remove the one that is not the checkpoint"
        )
    if single.is_file():
        return None, None
    if not index.is_file():
        found = sorted(p.name for p in directory.glob("*.bin")) if directory.is_dir() else []
        hint = f"; {found[0]} is a pickle, which is not supported (save with safe_serialization=True)" if found else ""
        raise HfCheckpointError(f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    try:
        text = index.read_bytes().decode()
        weight_map = parse_index(text)
    except ValueError as error:
        raise HfCheckpointError(f"{index} is damaged: {error}") from error
    for name in sorted(set(weight_map.values())):
        if not (directory / name).is_file():
            count = sum(file == name for file in weight_map.values())
            where = f"{printable(name)}, which does not exist in {directory}"
            raise HfCheckpointError(f"{index} places {count} tensors in {where}")
    return text, weight_map


def parse_index(text: str) -> dict[str, str]:
    """Return tensor -> file from the text of an index.

    Raises:
        ValueError: it is no index, or names a file elsewhere.
    """
    found = parse_json_object(text, "it").get("weight_map")
    if not isinstance(found, dict):
        raise ValueError(f"weight_map is {shown(found)}; expected an object of tensors and files")
    for tensor, file in found.items():
        if fault := plain_name_fault(file):
            raise ValueError(f"it places {printable(tensor)} in {fault}")
    return found


def _merge(headers: dict[str, FileHeader]) -> dict[str, TensorInfo]:
    merged: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in merged:
                raise HfCheckpointError(f"{printable(name)} is in two files: {merged[name].file} and {file}")
            merged[name] = info
    return merged


def _check_index(weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        found = tensors[name].file if name in tensors else "none of the files"
        if found != file:
            raise HfCheckpointError(f"{INDEX_FILE} places {printable(name)} in {file}, but it is in {found}")
    if extra := sorted(tensors.keys() - weight_map.keys()):
        file = tensors[extra[0]].file
        raise HfCheckpointError(f"{file} holds {printable(extra[0])}, which {INDEX_FILE} does not name")


def _left_aside(directory: Path, tensors: Mapping[str, TensorInfo], *, ignore_extra: bool) -> set[str]:
    """Return the tensors that are not read.

    Raises:
        HfCheckpointError: there are parts beside the decoder, and ``ignore_extra`` is false.
    """
    extra = extra_tensors(tensors)
    if extra and not ignore_extra:
        parts = "; ".join(f"{part}: {listed(names)}" for part, names in extra.items())
        raise HfCheckpointError(
            f"{directory} holds tensors of parts beside the decoder ({parts}); convert it with "
            f"checkpoint_convert.hf_to_megatron {IGNORE_FLAG}, which leaves them aside, and give the converted "
            "checkpoint (--pretrained-checkpoint, or --teacher-load for a teacher)"
        )
    return rotary_buffers(tensors).union(*extra.values())


def _check_tensors(arch: Architecture, tensors: dict[str, TensorInfo]) -> None:
    """Check names and shapes against the architecture; one message reports all problems (at most 8)."""
    if arch.num_layers * max(1, arch.num_experts) > len(tensors):  # also keeps the tables below small
        experts = f" of {arch.num_experts} experts" if arch.num_experts else ""
        raise HfCheckpointError(
            f"config.json says {arch.num_layers} layers{experts} (num_hidden_layers), but there are only "
            f"{len(tensors)} tensors"
        )
    expected = hf_shapes(arch)
    allowed = expected | ({LM_HEAD: expected[EMBED_TOKENS]} if arch.tie_word_embeddings else {})
    problems = []
    if unknown := tensors.keys() - allowed.keys():
        problems.append(f"unknown tensors: {listed(unknown)}")
    if missing := expected.keys() - tensors.keys():
        problems.append(f"missing tensors: {listed(missing)}")
    for name in sorted(tensors.keys() & allowed.keys()):
        if tensors[name].shape != allowed[name]:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, expected {list(allowed[name])}")
    if problems:
        raise HfCheckpointError(
            f"the weights are not those of a {arch.family} model with this config.json: " + "; ".join(problems[:8])
        )


def is_sidecar(path: Path) -> bool:
    """Return whether a file of an HF directory holds no weights (config, tokenizer, chat template and the like)."""
    return (
        path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
    )


def copy_sidecars(source: str | Path, target: str | Path, *, skip: Iterable[str] = ()) -> list[str]:
    """Copy all files without weights (config, tokenizer, chat template, licence) byte for byte; return their names.

    ``config.json`` comes last and whole: a directory that has it has all the others.
    """
    target = Path(target)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
    skipped = set(skip)
    names = sorted(p.name for p in Path(source).iterdir() if is_sidecar(p) and p.name not in skipped)
    for name in names:
        if name != CONFIG_FILE:
            with writing(target / name):
                shutil.copyfile(Path(source) / name, target / name)
    if CONFIG_FILE in names:
        with replacing(target / CONFIG_FILE) as temporary:
            shutil.copyfile(Path(source) / CONFIG_FILE, temporary)
    return names
