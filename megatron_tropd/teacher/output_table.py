"""Reshards the teacher's output table (hidden states -> logits) to the vocabulary shards of the student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import WORLD, Link, TensorSpec, exchange
from megatron_tropd.parallel.layout import ParallelLayout


def _rows(layout_tp: int, padded: int, vocab_size: int, tp: int) -> range:
    """Return the range of ids of one tensor-parallel rank, without padding."""
    per_rank = padded // layout_tp
    return range(min(tp * per_rank, vocab_size), min((tp + 1) * per_rank, vocab_size))


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The ranks of a model, as the link between two models numbers them."""

    layout: ParallelLayout
    first: int = 0
    """Number of the layout's rank 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """Ids whose rows go from one rank to another, by their numbers on the link."""

    owner: int
    peer: int
    ids: range
    start: int
    """First id of the owner's rows."""


def _moves(source: Grid, target: Grid, padded: tuple[int, int], vocab_size: int) -> Iterator[_Move]:
    """Yield who sends which rows to whom, for every receiver by ascending id."""
    for peer in range(target.layout.world_size):
        place = target.layout.coords(peer)
        if place.pp != target.layout.pp - 1:
            continue
        wanted = _rows(target.layout.tp, padded[1], vocab_size, place.tp)
        for tp in range(source.layout.tp):
            held = _rows(source.layout.tp, padded[0], vocab_size, tp)
            common = range(max(wanted.start, held.start), min(wanted.stop, held.stop))
            if common:
                owner = source.layout.rank(tp=tp, pp=source.layout.pp - 1, dp=place.dp % source.layout.dp)
                yield _Move(owner=source.first + owner, peer=target.first + peer, ids=common, start=held.start)


def reshard_output_table(
    table: Tensor | None,
    source: Grid,
    target: Grid,
    *,
    width: int,
    dtype: torch.dtype,
    padded: tuple[int, int],
    vocab_size: int,
    link: Link = WORLD,
) -> Tensor | None:
    """Rows of a frozen model's output table for the ids of each of the student's ranks; collective over both models.

    Any layout to any layout, once at start: a row travels only to the ranks that need it, and each replica of the
    student is served by another replica of the teacher as far as there are enough.

    Args:
        table: this rank's rows in the teacher's layout, [V_padded / tp, H]; None before its last stage.
        source: the teacher's ranks.
        target: the student's.
        width: H of the teacher.
        dtype: of the table.
        padded: rows of the whole table, padding included, in the teacher's and in the student's layout.
        vocab_size: number of ids that both models share.
        link: between all these ranks.

    Returns:
        [v, H] on this rank's device for the shared ids of its shard, on every rank of the student's
        last stage; None elsewhere.
    """
    rank = link.rank
    send: dict[int, list[Tensor]] = {}
    receive: dict[int, list[TensorSpec]] = {}
    for move in _moves(source, target, padded, vocab_size):
        if move.owner == rank:
            assert table is not None, "the teacher's last stage holds its output table"
            send[move.peer] = [table[move.ids.start - move.start : move.ids.stop - move.start]]
        if move.peer == rank:
            receive[move.owner] = [TensorSpec(shape=(len(move.ids), width), dtype=dtype)]
    arrived = exchange(send, receive, link)
    place = rank - target.first
    if place not in range(target.layout.world_size) or target.layout.coords(place).pp != target.layout.pp - 1:
        return None
    parts = [arrived[owner][0] for owner in receive]  # by ascending id, as moves are
    rows = torch.cat(parts) if parts else torch.empty(0, width, dtype=dtype)
    return rows.to(platform.device())
