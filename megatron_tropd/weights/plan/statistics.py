"""The cost of a plan: bytes, balance between ranks, and bytes that stay on a GPU or a node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from megatron_tropd.weights.plan.types import Placement, WeightPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStats:
    """Totals of one update.  Bytes are payload, without message headers."""

    copies: int
    messages: int
    pairs: int
    """Number of (source rank, engine rank) pairs with messages."""
    buckets: int
    bytes: int
    egress_max: int
    """The most bytes that one source rank sends."""
    egress_mean: float
    """Mean over all source ranks, those that send nothing included."""
    ingress_max: int
    ingress_mean: float
    same_gpu_bytes: int
    same_node_bytes: int
    """Bytes between two GPUs of one node."""

    @property
    def remote_bytes(self) -> int:
        """Bytes between nodes."""
        return self.bytes - self.same_gpu_bytes - self.same_node_bytes


def plan_stats(plan: WeightPlan) -> PlanStats:
    """Add up the bytes and messages of a plan."""
    egress: Counter[int] = Counter()
    ingress: Counter[tuple[int, int]] = Counter()
    pairs, same_gpu, same_node, copies = set(), 0, 0, 0
    for message in plan.messages:
        size, target = message.payload_bytes, (message.engine, message.engine_rank)
        egress[message.source] += size
        ingress[target] += size
        pairs.add((message.source, target))
        copies += len(message.copies)
        here, there = (
            plan.source_placements[message.source],
            plan.engine_placements[message.engine][message.engine_rank],
        )
        if here == there:
            same_gpu += size
        elif here.node == there.node:
            same_node += size
    total = egress.total()
    return PlanStats(
        copies=copies, messages=len(plan.messages), pairs=len(pairs), buckets=plan.num_buckets, bytes=total,
        egress_max=max(egress.values(), default=0), egress_mean=total / plan.num_sources,
        ingress_max=max(ingress.values(), default=0),
        ingress_mean=total / max(1, sum(engine.tp for engine in plan.engines)), same_gpu_bytes=same_gpu,
        same_node_bytes=same_node,
    )  # fmt: skip


def consecutive_placements(count: int, *, first: int = 0, gpus_per_node: int = 8) -> tuple[Placement, ...]:
    """Return the placements of ``count`` ranks on GPU ``first``, ``first + 1`` ... of a cluster of equal nodes."""
    return tuple(
        Placement(node=number // gpus_per_node, gpu=number % gpus_per_node) for number in range(first, first + count)
    )
