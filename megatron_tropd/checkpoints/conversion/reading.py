"""Read a torch_dist checkpoint as HF tensors, band by band."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.checkpoints.conversion.workers import Workers, merge
from megatron_tropd.checkpoints.conversion.writing import rows_of
from megatron_tropd.checkpoints.directory import MODEL_PREFIXES
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.safety import read_dcp_metadata
from megatron_tropd.parallel.fail_together import from_all_ranks, on_all_ranks
from megatron_tropd.weights.coordinates.box import Box
from megatron_tropd.weights.coordinates.checkpoint_boxes import StoredParam, by_hf_tensor
from megatron_tropd.weights.files.byte_ranges import Scratch, tensor_bytes
from megatron_tropd.weights.files.torch_dist import TorchDistReader


def open_tensors(folder: Path) -> TorchDistReader:
    """Open the tensors of a checkpoint folder for reading.  Collective.

    Raises:
        CheckpointError: on every process, if on any the ``.metadata`` is missing, damaged or unsafe.
    """
    return on_all_ranks(lambda: TorchDistReader(folder, read_dcp_metadata(folder)), CheckpointError)


def check_stored(stored: TorchDistReader, params: Sequence[StoredParam], prefix: str = "") -> None:
    """Compare the tensors of a checkpoint with the parameters of the model.

    Args:
        stored: Reader of the checkpoint.
        params: All parameters of the model.
        prefix: "" for the weights, which must all be there; or that of optimizer state, which may be partial.

    Raises:
        CheckpointError: tensors are missing, unknown or of another shape; the message lists them.
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
        if expected[key].may_be_padded:  # tables that differ only in their padding rows are the same
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
    """Yield (first row, band) of one HF tensor in row order, in the stored dtype; a band is valid until the next."""
    for param, box in boxes:
        key = prefix + param.key
        dtype = stored.tensors[key][1]
        step = -(-box.size[0] // -(-box.size[0] // rows_of(box.size, dtype, buffer_bytes)))
        for offset in range(0, box.size[0], step):
            size = (min(step, box.size[0] - offset), *box.size[1:])
            band = scratch.take(size, dtype)
            start = (*param.at, box.local_start[0] + offset, *box.local_start[1:])
            stored.read_into(key, start, band.view((1,) * len(param.at) + size))
            yield box.start[0] + offset, band


def _weighted(params: Sequence[StoredParam]) -> list[tuple[tuple[str, list[tuple[StoredParam, Box]]], int]]:
    tensors = by_hf_tensor(params)
    return [((name, boxes), sum(box.numel for _, box in boxes)) for name, boxes in tensors.items()]


def hf_tensors(
    stored: TorchDistReader, params: Sequence[StoredParam], buffer_bytes: int, workers: Workers, prefix: str = ""
) -> Iterator[tuple[str, Iterable[tuple[int, Tensor]]]]:
    """Yield (name, bands) of this process's HF tensors; read the bands of one before taking the next."""
    scratch = Scratch()
    for name, boxes in workers.mine(_weighted(params)):
        yield name, _hf_bands(boxes, stored, buffer_bytes, scratch, prefix)


def sha256_of(parts: Iterable[memoryview]) -> str:
    """Return the sha256 of bytes that come in parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hf_digests(
    stored: TorchDistReader, params: Sequence[StoredParam], dtypes: Mapping[str, torch.dtype] | None,
    buffer_bytes: int, workers: Workers, *, prefix: str = "",
) -> dict[str, str]:  # fmt: skip
    """Return the sha256 of every HF tensor as read from a checkpoint, converted to ``dtypes``.  Collective.

    With ``dtypes`` None the tensors keep their stored dtypes.  With a ``prefix``, the optimizer state under that prefix
    is digested instead of the weights.

    Raises:
        CheckpointError: on every process, if any process failed.
    """

    def work() -> dict[str, str]:
        return {
            name: sha256_of(tensor_bytes(band.to(dtypes[name]) if dtypes else band) for _, band in bands)
            for name, bands in hf_tensors(stored, params, buffer_bytes, workers, prefix)
        }

    return merge(from_all_ranks(work, CheckpointError))
