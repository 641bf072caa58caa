"""Write a torch_dist checkpoint as a stream of row bands, one file per process."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor

from megatron_tropd.atomic_files import writing
from megatron_tropd.checkpoints.conversion.workers import Workers
from megatron_tropd.checkpoints.metadata import CheckpointError, FileRecord
from megatron_tropd.checkpoints.state import COMMON_KEY
from megatron_tropd.parallel.checkpoint_writers import write_object
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.parallel.fail_together import on_all_ranks, on_rank_zero
from megatron_tropd.parallel.platform import COMMON_FILE
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam
from megatron_tropd.weights.coordinates.hf_shapes import Index
from megatron_tropd.weights.files.byte_ranges import Scratch
from megatron_tropd.weights.files.torch_dist import ChunkFile, WrittenFile, make_metadata, write_metadata

Fill = Callable[[range, Tensor], None]
"""Copies the given rows of a parameter into a tensor of those rows; padding rows are zero already and stay so."""


def rows_of(shape: Index, dtype: torch.dtype, buffer_bytes: int) -> int:
    """Return how many rows of a parameter fit into a buffer; at least 1."""
    return max(1, buffer_bytes // (math.prod(shape[1:]) * dtype.itemsize))


class ParamWriter:
    """Stores parameters in one process's file, band by band; a band is split into the target ranks' columns."""

    def __init__(self, file: ChunkFile, buffer_bytes: int) -> None:
        self._file, self._buffer_bytes = file, buffer_bytes
        self._band, self._piece = Scratch(), Scratch()

    def add(self, param: StoredParam, key: str, dtype: torch.dtype, fill: Fill) -> None:
        """Store ``param`` under ``key``, with the rows that ``fill`` provides."""
        lead = (1,) * len(param.at)
        for rows in param.bands(rows_of(param.shape, dtype, self._buffer_bytes)):
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


def finish(folder: Path, written: WrittenFile, tensors: dict[str, tuple[Index, torch.dtype]]) -> dict[str, FileRecord]:
    """Write ``.metadata`` from the records of all processes, and return the digests of all files.  Collective."""
    files = gather_objects(written)
    on_rank_zero(lambda: write_metadata(folder, make_metadata(files, tensors)), CheckpointError)
    return {file.name: FileRecord(bytes=file.nbytes, sha256=file.sha256) for file in files}


def write_plain_files(folder: Path) -> None:
    """Write the files besides the tensors that Megatron expects in a checkpoint that holds only weights."""
    write_object({COMMON_KEY: {}}, folder / COMMON_FILE)
    with writing(folder / "metadata.json"):
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
