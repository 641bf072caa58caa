"""Copy a checkpoint with other chunks or another vocabulary padding; the numbers, optimizer state included, stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_tropd.checkpoints.conversion.reading import check_stored, hf_digests, open_tensors
from megatron_tropd.checkpoints.conversion.verify import compare
from megatron_tropd.checkpoints.conversion.workers import Workers
from megatron_tropd.checkpoints.conversion.writing import ParamWriter, finish, write_file
from megatron_tropd.checkpoints.directory import MODEL_PREFIXES
from megatron_tropd.checkpoints.metadata import CheckpointError, FileRecord
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam
from megatron_tropd.weights.files.torch_dist import ChunkFile, TorchDistReader

_MODEL_KEY = re.compile("|".join(rf"(?<![^.]){re.escape(prefix)}" for prefix in MODEL_PREFIXES))
"""Matches where the key of a model weight begins inside a stored key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyJob:
    """One parameter, or one optimizer state of it, to be copied in other chunks."""

    prefix: str
    """Text before the model's key: "" for a weight, else ``optimizer.state.exp_avg.`` and the like."""
    param: StoredParam

    @property
    def key(self) -> str:
        """Key of the global tensor."""
        return self.prefix + self.param.key


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPlan:
    """Everything that is copied from one checkpoint into another."""

    jobs: tuple[CopyJob, ...]
    objects: tuple[str, ...]
    """Keys of values that are not tensors; these are copied byte for byte."""


def _prefixes(stored: TorchDistReader) -> list[str]:
    """Return the prefixes of stored keys: "" for the weights, and one for each kind of optimizer state.

    Raises:
        CheckpointError: a tensor is neither a weight nor the state of one.
    """
    prefixes = [""]
    for key in sorted(stored.tensors):
        if not (match := _MODEL_KEY.search(key)):
            raise CheckpointError(
                f"{key} is not optimizer state of a weight and cannot be resharded; convert only the weights "
                "(--no-load-optim)"
            )
        if (prefix := key[: match.start()]) not in prefixes:
            prefixes.append(prefix)
    return prefixes


def plan_copy(stored: TorchDistReader, params: Sequence[StoredParam], *, weights_only: bool) -> CopyPlan:
    """Plan what to copy.  Optimizer state has the shapes of the weights, and their keys with a prefix.

    Raises:
        CheckpointError: the checkpoint is of another model, or a tensor is neither a weight nor state of one.
    """
    prefixes = [""] if weights_only else _prefixes(stored)
    for prefix in prefixes:
        check_stored(stored, params, prefix)
    jobs = [CopyJob(prefix=prefix, param=param) for prefix in prefixes for param in params]
    return CopyPlan(
        jobs=tuple(job for job in jobs if job.key in stored.tensors),
        objects=() if weights_only else tuple(sorted(stored.objects)),
    )


def write_copy(
    stored: TorchDistReader, folder: Path, copy: CopyPlan, buffer_bytes: int, workers: Workers
) -> dict[str, FileRecord]:
    """Write the tensors and objects of ``copy`` into ``folder``, in the chunks and padding of the plan.  Collective.

    Raises:
        CheckpointError: on every process, if any process failed.
    """

    def fill(job: CopyJob, rows: range, band: Tensor) -> None:
        count = min(rows.stop, job.param.real_rows) - rows.start  # the rest is padding
        if count > 0:
            target = band[:count]
            start = (*job.param.at, rows.start, *(0,) * (band.ndim - 1))
            stored.read_into(job.key, start, target.view((1,) * len(job.param.at) + target.shape))

    def work(file: ChunkFile) -> None:
        writer = ParamWriter(file, buffer_bytes)
        for job in workers.mine([(job, job.param.numel) for job in copy.jobs]):
            writer.add(job.param, job.key, stored.tensors[job.key][1], partial(fill, job))
        for key in copy.objects if workers.rank == 0 else ():
            file.add_object(key, stored.read_object(key))

    tensors = {job.key: (job.param.global_shape, stored.tensors[job.key][1]) for job in copy.jobs}
    return finish(folder, write_file(folder, workers, work), tensors)


def verify_copy(
    stored: TorchDistReader, folder: Path, copy: CopyPlan, buffer_bytes: int, workers: Workers
) -> None:  # fmt: skip
    """Read both checkpoints again and compare every tensor's digest, prefix by prefix.  Collective.

    Raises:
        CheckpointError: on every process; names the tensors that differ.
    """
    written = open_tensors(folder)
    try:
        for prefix in sorted({job.prefix for job in copy.jobs}):
            params = [job.param for job in copy.jobs if job.prefix == prefix]
            wanted = hf_digests(stored, params, None, buffer_bytes, workers, prefix=prefix)
            compare(hf_digests(written, params, None, buffer_bytes, workers, prefix=prefix), wanted, str(folder))
    finally:
        written.close()
