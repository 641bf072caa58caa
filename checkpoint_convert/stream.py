"""Conversions as streams of row bands: no process ever holds a tensor, let alone a model.

Parameters are dealt out to the processes by bytes.  A process takes the rows of its parameters in order, one
band of at most the buffer's size at a time, and hashes what goes by; nothing is read twice and nothing is
sent but names and digests.  Peak memory above the interpreter is one buffer, two where dtypes differ or chunks
are cut by columns, three where both.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from megatron_tropd.training.agree import on_all_ranks, on_rank_zero
from megatron_tropd.training.checkpoint_directory import MODEL_PREFIXES
from megatron_tropd.training.checkpoint_metadata import CheckpointError, FileRecord
from megatron_tropd.training.checkpoint_safety import COMMON_FILE, read_dcp_metadata
from megatron_tropd.weights.boxes import EMBED_TOKENS, LM_HEAD, Box, Index
from megatron_tropd.weights.byte_ranges import Scratch, tensor_bytes
from megatron_tropd.weights.files import HfCheckpoint
from megatron_tropd.weights.stored import StoredParam, by_hf_tensor, shares
from megatron_tropd.weights.torch_dist import (
    ChunkFile,
    TorchDistReader,
    WrittenFile,
    make_metadata,
    write_metadata,
)
from megatron_tropd.weights.writer import HfWriter

COMMON_KEY = "common"

T = TypeVar("T")
Fill = Callable[[range, Tensor], None]
"""Puts some rows of a parameter into a tensor of those rows; where there is padding it holds zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """This process among those that share a conversion."""

    rank: int
    count: int

    @classmethod
    def of_job(cls) -> Workers:
        """All processes torchrun started."""
        return cls(rank=dist.get_rank(), count=dist.get_world_size())

    def mine(self, items: Sequence[tuple[T, int]]) -> list[T]:
        """This process's share of ``(item, bytes)`` pairs; the same deal on every process."""
        return shares(items, self.count)[self.rank]

    def gather(self, value: T) -> list[T]:
        """Everybody's value, by rank.  Collective."""
        parts: list[T] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(parts, value)
        return parts

    def merge(self, mine: dict[str, str]) -> dict[str, str]:
        """One mapping from everybody's, in name order.  Collective."""
        return dict(sorted((name, value) for part in self.gather(mine) for name, value in part.items()))


def _rows_of(shape: Index, dtype: torch.dtype, buffer_bytes: int) -> int:
    return max(1, buffer_bytes // (math.prod(shape[1:]) * dtype.itemsize))


class ParamWriter:
    """Stores parameters in one process's file, band by band, each band cut into a target rank's columns."""

    def __init__(self, file: ChunkFile, buffer_bytes: int) -> None:
        self._file, self._buffer_bytes = file, buffer_bytes
        self._band, self._piece = Scratch(), Scratch()

    def add(self, param: StoredParam, key: str, dtype: torch.dtype, fill: Fill) -> None:
        """Store ``param`` under ``key``; ``fill`` gives its rows."""
        lead = (1,) * len(param.at)
        for rows in param.bands(_rows_of(param.shape, dtype, self._buffer_bytes)):
            band = self._band.take((len(rows), *param.shape[1:]), dtype)
            if rows.stop > param.real_rows:
                band.zero_()
            fill(rows, band)
            columns = param.shape[1] if band.ndim == 2 else 0
            if columns <= param.cut[-1]:
                start = (*param.at, rows.start, *(0,) * (band.ndim - 1))
                self._file.add(key, start, band.view(lead + band.shape))
                continue
            for first in range(0, columns, param.cut[1]):
                piece = self._piece.take((len(rows), min(param.cut[1], columns - first)), dtype)
                piece.copy_(band[:, first : first + param.cut[1]])
                self._file.add(key, (*param.at, rows.start, first), piece.view(lead + piece.shape))


def finish(
    folder: Path, written: WrittenFile, tensors: dict[str, tuple[Index, torch.dtype]], workers: Workers
) -> dict[str, FileRecord]:
    """Write ``.metadata`` from everybody's records; digests of everybody's files.  Collective."""
    files = workers.gather(written)
    on_rank_zero(lambda: write_metadata(folder, make_metadata(files, tensors)), CheckpointError)
    return {file.name: FileRecord(bytes=file.nbytes, sha256=file.sha256) for file in files}


def write_plain_files(folder: Path) -> None:
    """Megatron's own files of a checkpoint that holds weights and nothing else."""
    torch.save({COMMON_KEY: {}}, folder / COMMON_FILE)
    save_config(CheckpointingConfig("torch_dist"), str(folder))


def write_file(folder: Path, workers: Workers, work: Callable[[ChunkFile], None]) -> WrittenFile:
    """Run ``work`` on this process's file of the checkpoint; fails on every process or on none.  Collective."""

    def run() -> WrittenFile:
        file = ChunkFile(folder, workers.rank)
        try:
            work(file)
            return file.close()
        finally:
            file.abandon()

    return on_all_ranks(run, CheckpointError)


class _HfRows:
    """Rows of parameters out of an HF checkpoint, with the digest of every HF tensor that goes by."""

    def __init__(self, source: HfCheckpoint) -> None:
        self._source = source
        self._digests: dict[str, hashlib._Hash] = {}
        self._raw = Scratch()

    def fill(self, param: StoredParam, rows: range, band: Tensor) -> None:
        for box in param.boxes:
            first, last = box.local_start[0], box.local_start[0] + box.size[0]
            low, high = max(first, rows.start), min(last, rows.stop)
            if low < high:
                self._fill(box, box.start[0] + low - first, band[low - rows.start : high - rows.start])

    def _fill(self, box: Box, row: int, target: Tensor) -> None:
        info = self._source.tensors[box.hf_name]
        raw = target if target.dtype == info.dtype else self._raw.take(target.shape, info.dtype)
        self._source.read_rows_into(box.hf_name, row, raw)
        self._digests.setdefault(box.hf_name, hashlib.sha256()).update(tensor_bytes(raw))
        if raw is not target:
            target.copy_(raw)
        if box.hf_name == EMBED_TOKENS:
            self._source.check_tied_copy((row, 0), tuple(target.shape))

    def hexdigests(self) -> dict[str, str]:
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        if self._source.has_tied_copy and EMBED_TOKENS in digests:
            digests[LM_HEAD] = digests[EMBED_TOKENS]  # found equal, row by row
        return digests


def hf_to_torch_dist(
    source: HfCheckpoint, folder: Path, params: Sequence[StoredParam], dtype: torch.dtype, buffer_bytes: int,
    workers: Workers,
) -> tuple[dict[str, FileRecord], dict[str, str]]:  # fmt: skip
    """Store an HF checkpoint as torch_dist tensors of ``dtype`` in ``folder``.  Collective.

    Returns:
        Records of the files, and the sha256 of every HF tensor's bytes.

    Raises:
        CheckpointError: on every process.
    """
    rows = _HfRows(source)

    def work(file: ChunkFile) -> None:
        writer = ParamWriter(file, buffer_bytes)
        for param in workers.mine([(param, param.numel) for param in params]):
            writer.add(param, param.key, dtype, partial(rows.fill, param))

    written = write_file(folder, workers, work)
    tensors = {param.key: (param.global_shape, dtype) for param in params}
    return finish(folder, written, tensors, workers), workers.merge(rows.hexdigests())


def open_tensors(folder: Path) -> TorchDistReader:
    """The tensors of a checkpoint folder.

    Raises:
        ValueError: its ``.metadata`` is missing, damaged or unsafe.
    """
    return TorchDistReader(folder, read_dcp_metadata(folder))


def check_stored(stored: TorchDistReader, params: Sequence[StoredParam], prefix: str = "") -> None:
    """Hold the tensors of a checkpoint against the model.

    Args:
        stored: The checkpoint.
        params: What the model has.
        prefix: "" for the weights, which must all be there; an optimizer's for its state, which may be partial.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; all of them in one message.
    """
    mine = {
        key.removeprefix(prefix): shape
        for key, (shape, _) in stored.tensors.items()
        if key.startswith(tuple(prefix + model for model in MODEL_PREFIXES))
    }
    expected = {param.key: param for param in params}
    problems = [f"unknown tensor {prefix}{key}" for key in sorted(mine.keys() - expected.keys())]
    if not prefix:
        problems += [f"missing tensor {key}" for key in sorted(expected.keys() - mine.keys())]
    for key in sorted(mine.keys() & expected.keys()):
        shape, found = expected[key].global_shape, mine[key]
        if expected[key].may_be_padded:  # more or less padding is the same table
            good = found[1:] == shape[1:] and found[0] >= expected[key].real_rows
            wanted = f"{[expected[key].real_rows, *shape[1:]]} or more rows"
        else:
            good, wanted = found == shape, f"{list(shape)}"
        if not good:
            problems.append(f"{prefix}{key} has shape {list(found)}, expected {wanted}")
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"the checkpoint does not hold the model its checkpoint.json names: {listed}")


def _hf_bands(
    boxes: Sequence[tuple[StoredParam, Box]],
    stored: TorchDistReader,
    buffer_bytes: int,
    scratch: Scratch,
    prefix: str = "",
) -> Iterable[tuple[int, Tensor]]:
    """(row, rows) of one HF tensor out of a checkpoint, in order, in the stored dtype; valid until the next."""
    for param, box in boxes:
        key = prefix + param.key
        dtype = stored.tensors[key][1]
        step = -(-box.size[0] // -(-box.size[0] // _rows_of(box.size, dtype, buffer_bytes)))
        for offset in range(0, box.size[0], step):
            size = (min(step, box.size[0] - offset), *box.size[1:])
            band = scratch.take(size, dtype)
            start = (*param.at, box.local_start[0] + offset, *box.local_start[1:])
            stored.read_into(key, start, band.view((1,) * len(param.at) + size))
            yield box.start[0] + offset, band


def _hf_tensors(
    stored: TorchDistReader, params: Sequence[StoredParam], buffer_bytes: int, workers: Workers, prefix: str = ""
) -> Iterator[tuple[str, Iterable[tuple[int, Tensor]]]]:
    """The HF tensors of this process by name, each as its bands, which must be read before the next tensor."""
    scratch = Scratch()
    for name, boxes in workers.mine(_weighted(params)):
        yield name, _hf_bands(boxes, stored, buffer_bytes, scratch, prefix)


def _sha256(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hf_digests(
    stored: TorchDistReader, params: Sequence[StoredParam], dtypes: Mapping[str, torch.dtype] | None,
    buffer_bytes: int, workers: Workers, *, prefix: str = "",
) -> dict[str, str]:  # fmt: skip
    """sha256 of every HF tensor as a checkpoint would give it back, in the dtypes of its files.  Collective.

    With ``dtypes`` None in the stored dtype, with a ``prefix`` of the optimizer's state instead of the weights.

    Raises:
        CheckpointError: on every process.
    """

    def work() -> dict[str, str]:
        return {
            name: _sha256(tensor_bytes(band.to(dtypes[name]) if dtypes else band) for _, band in bands)
            for name, bands in _hf_tensors(stored, params, buffer_bytes, workers, prefix)
        }

    return workers.merge(on_all_ranks(work, CheckpointError))


def verify_stored(
    folder: Path, params: Sequence[StoredParam], source: HfCheckpoint, digests: Mapping[str, str], buffer_bytes: int,
    workers: Workers,
) -> None:  # fmt: skip
    """Read a written checkpoint again and hold every HF tensor against the digest of its source.  Collective.

    Raises:
        CheckpointError: on every process; names the tensors that differ.
    """
    stored = open_tensors(folder)
    try:
        on_all_ranks(lambda: check_stored(stored, params), CheckpointError)
        dtypes = {name: info.dtype for name, info in source.tensors.items()}
        found = hf_digests(stored, params, dtypes, buffer_bytes, workers)
    finally:
        stored.close()
    compare(found, digests, str(folder))


def verify_hf(writer: HfWriter, digests: Mapping[str, str], workers: Workers) -> None:
    """Read HF files again before they are published, and hold every tensor against what was written.  Collective.

    Raises:
        CheckpointError: on every process; names the tensors that differ.
    """

    def work() -> dict[str, str]:
        names = workers.mine([(name, info.nbytes) for name, info in sorted(writer.manifest.tensors.items())])
        return {name: writer.written_sha256(name) for name in names}

    compare(workers.merge(on_all_ranks(work, CheckpointError)), digests, str(writer.directory))


def compare(found: Mapping[str, str], wanted: Mapping[str, str], where: str) -> None:
    """Raise CheckpointError, with the first few names, unless ``found`` digests are the ``wanted`` ones."""
    differing = sorted(name for name, digest in found.items() if wanted.get(name) != digest)
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(f"{where} was not written right: {', '.join(differing[:5])}{more} came back differently")


def _weighted(params: Sequence[StoredParam]) -> list[tuple[tuple[str, list[tuple[StoredParam, Box]]], int]]:
    tensors = by_hf_tensor(params)
    return [((name, boxes), sum(box.numel for _, box in boxes)) for name, boxes in tensors.items()]


def torch_dist_to_hf(
    stored: TorchDistReader, params: Sequence[StoredParam], writer: HfWriter, buffer_bytes: int, workers: Workers,
    *, verify: bool,
) -> dict[str, str]:  # fmt: skip
    """Fill the files of ``writer`` (made by :meth:`HfWriter.create`) from a checkpoint.  Collective.

    Args:
        stored: The checkpoint.
        params: Its model.
        writer: One per process, of the same directory.
        buffer_bytes: Largest band.
        workers: Who shares the work.
        verify: Hold every tensor against the sha256 in the writer's manifest.

    Returns:
        sha256 of the bytes written, by HF tensor.

    Raises:
        CheckpointError: on every process.
    """

    def work() -> dict[str, str]:
        found: dict[str, str] = {}
        for name, bands in _hf_tensors(stored, params, buffer_bytes, workers):
            digest = _sha256(writer.write_rows(name, row, band) for row, band in bands)
            if verify:
                writer.check_digest(name, digest)
            found.update(dict.fromkeys(writer.names(name), digest))
        return found

    return workers.merge(on_all_ranks(work, CheckpointError))
