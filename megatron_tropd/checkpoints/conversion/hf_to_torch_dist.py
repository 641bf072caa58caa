"""Convert HF files to a torch_dist checkpoint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.checkpoints.conversion.workers import Workers, merge
from megatron_tropd.checkpoints.conversion.writing import ParamWriter, finish, write_file
from megatron_tropd.checkpoints.metadata import FileRecord
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.weights.coordinates.box import Box
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam
from megatron_tropd.weights.coordinates.hf_shapes import EMBED_TOKENS, LM_HEAD
from megatron_tropd.weights.files.byte_ranges import Scratch, tensor_bytes
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from megatron_tropd.weights.files.torch_dist import ChunkFile


class _HfRows:
    """Reads rows of parameters from an HF checkpoint, and digests every HF tensor on the way."""

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
            digests[LM_HEAD] = digests[EMBED_TOKENS]  # check_tied_copy has compared every row
        return digests


def hf_to_torch_dist(
    source: HfCheckpoint, folder: Path, params: Sequence[StoredParam], dtype: torch.dtype, buffer_bytes: int,
    workers: Workers,
) -> tuple[dict[str, FileRecord], dict[str, str]]:  # fmt: skip
    """Store an HF checkpoint as torch_dist tensors of ``dtype`` in ``folder``.  Collective.

    Returns:
        Records of the files, and the sha256 of every HF tensor's bytes.

    Raises:
        CheckpointError: on every process, if any process failed.
    """
    rows = _HfRows(source)

    def work(file: ChunkFile) -> None:
        writer = ParamWriter(file, buffer_bytes)
        for param in workers.mine([(param, param.numel) for param in params]):
            writer.add(param, param.key, dtype, partial(rows.fill, param))

    written = write_file(folder, workers, work)
    tensors = {param.key: (param.global_shape, dtype) for param in params}
    return finish(folder, written, tensors), merge(gather_objects(rows.hexdigests()))
