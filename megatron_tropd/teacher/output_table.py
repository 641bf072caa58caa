"""Reshards the teacher's output table (hidden states -> logits) to the vocabulary shards of the student."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import TensorSpec, exchange
from megatron_tropd.parallel.groups import ModelGroups


def _rows(layout_tp: int, padded: int, vocab_size: int, tp: int) -> range:
    """Return the range of ids of one tensor-parallel rank, without padding."""
    per_rank = padded // layout_tp
    return range(min(tp * per_rank, vocab_size), min((tp + 1) * per_rank, vocab_size))


def reshard_output_table(
    table: Tensor | None,
    source: ModelGroups,
    target: ModelGroups,
    *,
    width: int,
    dtype: torch.dtype,
    padded: tuple[int, int],
    vocab_size: int,
) -> Tensor | None:
    """Rows of a frozen model's output table for the ids of each of the student's ranks; collective over the world.

    Any layout to any layout, once at start: a row travels only to the ranks that need it, and each replica of the
    student is served by another replica of the teacher as far as there are enough.

    Args:
        table: this rank's rows in the teacher's layout, [V_padded / tp, H]; None before its last stage.
        source: the teacher's place in the world.
        target: the student's.
        width: H of the teacher.
        dtype: of the table.
        padded: rows of the whole table, padding included, in the teacher's and in the student's layout.
        vocab_size: number of ids that both models share.

    Returns:
        [v, H] on this rank's device for the shared ids of its shard, on every rank of the student's
        last stage; None elsewhere.
    """
    rank, send, receive = dist.get_rank(), {}, {}
    for peer in range(target.layout.world_size):
        place = target.layout.coords(peer)
        if place.pp != target.layout.pp - 1:
            continue
        wanted = _rows(target.layout.tp, padded[1], vocab_size, place.tp)
        for tp in range(source.layout.tp):
            held = _rows(source.layout.tp, padded[0], vocab_size, tp)
            common = range(max(wanted.start, held.start), min(wanted.stop, held.stop))
            if not common:
                continue
            owner = source.layout.rank(tp=tp, pp=source.layout.pp - 1, dp=place.dp % source.layout.dp)
            if owner == rank:
                assert table is not None, "the teacher's last stage holds its output table"
                send[peer] = [table[common.start - held.start : common.stop - held.start]]
            if peer == rank:
                receive[owner] = [TensorSpec(shape=(len(common), width), dtype=dtype)]
    arrived = exchange(send, receive)
    if not target.is_last_stage:
        return None
    parts = [arrived[owner][0] for owner in receive]  # by ascending id: owners were met in the order of their rows
    rows = torch.cat(parts) if parts else torch.empty(0, width, dtype=dtype)
    return rows.to(platform.device())
