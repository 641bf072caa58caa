"""Decide which rank sends which bytes of which parameter to which rank.  Integers only; equal on every rank.

Every destination box is intersected with the shards that the source ranks hold.  Each piece gets one
sender: a replica on the same GPU if there is one, else on the same node, else any; of equally near ones the
replica that sends least so far, then the lowest rank.  Pieces are put into buckets; a message is everything
that one sender sends one receiver in one bucket.  ``proof.py`` checks a plan without using this module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.box import ParamBoxes
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout, engine_boxes
from megatron_tropd.weights.coordinates.hf_shapes import Index, hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.plan.bucketing import HEADER_BYTES, BucketPacker
from megatron_tropd.weights.plan.shards import Holder, Piece, PlanError, TensorShards, source_shards
from megatron_tropd.weights.plan.types import (
    DEFAULT_BUCKET_BYTES,
    ITEMSIZES,
    STAGING_HALVES,
    Copy,
    Message,
    Placement,
    WeightPlan,
    plan_digest,
)


def source_params(arch: Architecture, layout: ParallelLayout) -> list[tuple[tuple[int, ...], tuple[ParamBoxes, ...]]]:
    """Return (ranks, their parameters) for every set of Megatron ranks that hold the same parameters."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        c = layout.coords(rank)
        alike.setdefault((c.tp, c.pp, c.etp, c.ep), []).append(rank)
    return [(tuple(ranks), rank_boxes(arch, layout, ranks[0])) for ranks in alike.values()]


class _Senders:
    """Chooses a sender for every piece and counts the bytes that each rank sends."""

    def __init__(self, placements: Sequence[Placement]) -> None:
        self._placements = placements
        self._load = [0] * len(placements)

    def distances(self, target: Placement) -> list[int]:
        """Return, by source rank: 0 on the target's GPU, 1 on its node, 2 elsewhere."""
        return [0 if place == target else 1 if place.node == target.node else 2 for place in self._placements]

    def choose(self, holders: Iterable[Holder], distances: Sequence[int], num_bytes: int) -> tuple[int, Holder]:
        """Choose the sender of a piece of ``num_bytes``; return it and the parameter that holds the piece."""
        load = self._load
        _, _, rank, _, holder = min(
            (distances[rank], load[rank], rank, number, holder)
            for number, holder in enumerate(holders)
            for rank in holder.ranks
        )
        load[rank] += num_bytes
        return rank, holder


def _wanted(
    shards: dict[str, TensorShards], params: Iterable[ParamBoxes], max_elements: int
) -> list[tuple[str, str, Piece]]:
    """Return (HF name, parameter, piece) for one destination rank in model order, no piece above ``max_elements``."""
    return [
        (box.hf_name, param.names[0], part)
        for param in params
        for box in param.boxes
        for piece in shards[box.hf_name].pieces(box)
        for part in piece.split(box.hf_name, max_elements)
    ]


def _shift(start: Index, offset: Index) -> Index:
    return tuple(a + b for a, b in zip(start, offset, strict=True))


def _copies(
    wanted: Iterable[tuple[str, str, Piece]],
    senders: _Senders,
    target: Placement,
    engine: int,
    rank: int,
    itemsize: int,
) -> Iterator[Copy]:
    """Choose the sender of every piece and yield one copy per piece."""
    distances = senders.distances(target)
    for hf_name, name, piece in wanted:
        num_bytes = piece.numel * itemsize
        source, holder = senders.choose(piece.holders, distances, num_bytes)
        yield Copy(
            hf_name=hf_name, source=source, source_names=holder.names,
            source_start=_shift(holder.local_start, piece.offset), engine=engine, engine_rank=rank, name=name,
            start=piece.start, size=piece.size, num_bytes=num_bytes,
        )  # fmt: skip


def _apart(num_sources: int, engines: Sequence[EngineLayout]) -> tuple[list[Placement], list[list[Placement]]]:
    """Return placements for ranks whose machines are not known: no two share a node."""
    node = count()
    return (
        [Placement(node=next(node), gpu=0) for _ in range(num_sources)],
        [[Placement(node=next(node), gpu=0) for _ in range(engine.tp)] for engine in engines],
    )


def _check_placements(
    num_sources: int,
    engines: Sequence[EngineLayout],
    sources: Sequence[Placement],
    targets: Sequence[Sequence[Placement]],
) -> None:
    given, expected = (len(sources), [len(t) for t in targets]), (num_sources, [engine.tp for engine in engines])
    if given != expected:
        raise PlanError(f"placements of (source ranks, ranks of each engine) {given} were given, there are {expected}")


def build_plan(
    arch: Architecture,
    layout: ParallelLayout,
    engines: Sequence[EngineLayout],
    *,
    dtype: str,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    source_placements: Sequence[Placement] | None = None,
    engine_placements: Sequence[Sequence[Placement]] | None = None,
) -> WeightPlan:
    """Plan one update of every engine.

    Args:
        dtype: Dtype of every parameter on both sides, by torch's name (:data:`ITEMSIZES`).
        bucket_bytes: Staging memory a rank may use, headers included.
        source_placements: By source rank.
        engine_placements: By engine and rank.  Unless both are given, no two ranks share a node.

    Raises:
        PlanError, ValueError: a layout that does not fit the model, sources that lack an element, a bucket
            too small for a row; the message names the flag or the tensor.
    """
    if dtype not in ITEMSIZES:
        raise PlanError(f"weights of {dtype} are not supported; known are {', '.join(ITEMSIZES)}")
    sources = source_params(arch, layout)
    shards = source_shards(hf_shapes(arch), sources)
    if source_placements is None or engine_placements is None:
        source_placements, engine_placements = _apart(layout.world_size, engines)
    _check_placements(layout.world_size, engines, source_placements, engine_placements)
    itemsize, half = ITEMSIZES[dtype], bucket_bytes // STAGING_HALVES
    senders, packer = _Senders(source_placements), BucketPacker(half)
    lots: dict[tuple[int, int, int, int], list[Copy]] = {}
    wanted: dict[tuple[EngineLayout, int], list[tuple[str, str, Piece]]] = {}  # shared by engines of one layout
    for engine, engine_layout in enumerate(engines):
        for rank in range(engine_layout.tp):
            key = (engine_layout, rank)
            if key not in wanted:
                params = engine_boxes(arch, engine_layout, rank)
                wanted[key] = _wanted(shards, params, (half - HEADER_BYTES) // itemsize)
            for copy in _copies(wanted[key], senders, engine_placements[engine][rank], engine, rank, itemsize):
                bucket = packer.place(copy.source, (engine, rank), copy.num_bytes)
                lots.setdefault((bucket, copy.source, engine, rank), []).append(copy)
    messages = tuple(
        Message(bucket=bucket, source=source, engine=engine, engine_rank=rank, copies=tuple(copies))
        for (bucket, source, engine, rank), copies in sorted(lots.items())
    )
    plan = WeightPlan(
        num_sources=layout.world_size, engines=tuple(engines), dtype=dtype, bucket_bytes=bucket_bytes,
        source_placements=tuple(source_placements), engine_placements=tuple(map(tuple, engine_placements)),
        messages=messages,
    )  # fmt: skip
    return replace(plan, digest=plan_digest(plan))
