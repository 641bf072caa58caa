"""Exact top-k over a vocabulary that is split over ranks, ordered by (logit descending, id ascending).

Equal logits are usual in bf16: without the id in the order, the choice among equal logits would depend on the number
of ranks.  The k greatest values of a row are unique as values; only the ids of the values equal to the k-th may be
ambiguous, and these ids are searched for where that is the case.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.ops import kernels
from megatron_tropd.ops.rows import row_blocks
from megatron_tropd.ops.shard import VocabShard

_ABSENT = torch.iinfo(torch.int64).min


def local_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values in the logits' dtype, columns int64) [C, k] of the first k columns by (value descending, column
    ascending), in no particular order; ``k`` is at most v."""
    values, columns = logits.topk(k, dim=1, sorted=True)
    lowest_equals_(logits, values, columns)
    return values, columns


def lowest_equals_(logits: Tensor, values: Tensor, columns: Tensor) -> None:
    """In place: the entries of ``columns`` [C, k] whose value in ``values`` (sorted) equals the k-th become the lowest
    columns of ``logits`` [C, v] with this value.  Without Triton the host waits for the device."""
    if kernels.use_triton(logits):
        kernels.load().lowest_equals_(logits, values, columns)
        return
    last = values[:, -1:]
    taken = (values == last).sum(1)
    for rows in row_blocks(logits):
        equal = logits[rows] == last[rows]
        doubtful = (equal.sum(1) > taken[rows]).nonzero().squeeze(1)
        if len(doubtful):
            columns[rows.start + doubtful] = _first_of_equals(
                values[rows][doubtful], columns[rows][doubtful], equal[doubtful]
            )


def _first_of_equals(values: Tensor, columns: Tensor, equal: Tensor) -> Tensor:
    """``columns`` [n, k], where the entries with the k-th value become the lowest columns of ``equal`` [n, v]."""
    k, width = columns.shape[1], equal.shape[1]
    every = torch.arange(width, dtype=torch.int32, device=equal.device)
    lowest = torch.where(equal, every, width).topk(k, dim=1, largest=False, sorted=True).values.long()
    above = (values != values[:, -1:]).sum(1, keepdim=True)  # sorted: these come first
    place = torch.arange(k, device=equal.device) - above
    return torch.where(place < 0, columns, lowest.gather(1, place.clamp(min=0)))


def sort_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that rank by (value descending, id ascending); ``ids`` are below 2^31.  -0.0 equals 0.0."""
    bits = (values.float() + 0.0).contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 31) + (0x7FFFFFFF - ids)


def split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(ids int64, values fp32) from the keys of :func:`sort_keys`."""
    ids = 0x7FFFFFFF - (keys & 0x7FFFFFFF)
    ordered = (keys >> 31).int()
    return ids, torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def exact_topk(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """(ids int64, logits fp32) [C, k] of the whole vocabulary, in order; ``logits`` [C, v] are this rank's.

    One all-gather of k candidates: every id of the result is among the first k of its own shard.
    """
    local_k = min(k, logits.shape[1])
    keys = torch.full((len(logits), k), _ABSENT, device=logits.device)
    if local_k:
        values, columns = local_topk(logits, local_k)
        keys[:, :local_k] = sort_keys(values, columns + shard.start)
    gathered = [torch.empty_like(keys) for _ in range(shard.world_size)]
    dist.all_gather(gathered, keys, group=shard.group)
    return split_keys(torch.cat(gathered, 1).topk(k, dim=1).values)


def topk_overlap(logits: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """fp32 [C]: share of the K ``ids`` [C, K] that are in the exact top-K of the rows; collective."""
    own, _ = exact_topk(logits, ids.shape[1], shard)
    ordered = own.sort(1).values
    place = torch.searchsorted(ordered, ids).clamp(max=ids.shape[1] - 1)
    return (ordered.gather(1, place) == ids).float().mean(1)
