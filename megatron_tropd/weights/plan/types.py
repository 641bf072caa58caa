"""A weight plan as data: the copies, the messages that carry them, and their digest.  Integers only."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.coordinates.hf_shapes import Index

DEFAULT_BUCKET_BYTES = 512 << 20
ITEMSIZES = {"bfloat16": 2, "float16": 2, "float32": 4}
STAGING_HALVES = 2
"""Halves of a rank's staging memory: it packs or unpacks one while the other is being transferred."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a rank runs."""

    node: int
    gpu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A rectangle of one source parameter that becomes a rectangle of one engine parameter."""

    hf_name: str
    source: int
    source_names: tuple[str, ...]
    """Names that the parameter may have on the source (:class:`ParamBoxes`)."""
    source_start: Index
    engine: int
    engine_rank: int
    name: str
    """Name of the parameter in the engine's model."""
    start: Index
    """Position in the engine's parameter; one entry more than ``size`` where that stacks experts."""
    size: Index
    num_bytes: int

    @property
    def source_slices(self) -> tuple[slice, ...]:
        """Index of the rectangle in the source parameter."""
        return tuple(slice(s, s + n) for s, n in zip(self.source_start, self.size, strict=True))

    @property
    def slices(self) -> tuple[int | slice, ...]:
        """Index of the rectangle in the engine's parameter; what it selects has the shape ``size``."""
        stacked = len(self.start) - len(self.size)
        rows = zip(self.start[stacked:], self.size, strict=True)
        return (*self.start[:stacked], *(slice(s, s + n) for s, n in rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """Everything that one source rank sends one engine rank in one bucket: the copies, one after the other."""

    bucket: int
    source: int
    engine: int
    engine_rank: int
    copies: tuple[Copy, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes of all copies."""
        return sum(copy.num_bytes for copy in self.copies)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightPlan:
    """All messages of one update, ordered by bucket, source, engine and engine rank."""

    num_sources: int
    engines: tuple[EngineLayout, ...]
    dtype: str
    """Dtype of every parameter, by torch's name (:data:`ITEMSIZES`)."""
    bucket_bytes: int
    """Staging memory of any rank, senders and receivers alike."""
    source_placements: tuple[Placement, ...]
    engine_placements: tuple[tuple[Placement, ...], ...]
    messages: tuple[Message, ...]
    digest: str = field(default="", compare=False)
    """sha256 of everything above, so that ranks can check that they built the same plan."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return ITEMSIZES[self.dtype]

    @property
    def num_buckets(self) -> int:
        """Number of buckets of an update."""
        return self.messages[-1].bucket + 1 if self.messages else 0

    @property
    def world_size(self) -> int:
        """Ranks of the group that carries the plan: the sources, then every engine's ranks."""
        return self.num_sources + sum(engine.tp for engine in self.engines)

    def group_rank(self, engine: int, engine_rank: int) -> int:
        """Return the rank in that group of rank ``engine_rank`` of an engine."""
        return self.num_sources + sum(layout.tp for layout in self.engines[:engine]) + engine_rank

    def for_sender(self, rank: int) -> tuple[Message, ...]:
        """Return the messages that source ``rank`` sends, in order."""
        return tuple(message for message in self.messages if message.source == rank)

    def for_receiver(self, engine: int, engine_rank: int) -> tuple[Message, ...]:
        """Return the messages that a rank of an engine receives, in order."""
        return tuple(m for m in self.messages if (m.engine, m.engine_rank) == (engine, engine_rank))


def plan_digest(plan: WeightPlan) -> str:
    """Return the sha256 of a plan's contents."""
    head = (
        plan.num_sources,
        plan.engines,
        plan.dtype,
        plan.bucket_bytes,
        plan.source_placements,
        plan.engine_placements,
    )
    digest = hashlib.sha256(repr(head).encode())
    for message in plan.messages:
        numbers = array("q", (message.bucket, message.source, message.engine, message.engine_rank))
        names: list[str] = []
        for copy in message.copies:
            numbers.extend((copy.source, copy.engine, copy.engine_rank, copy.num_bytes))
            numbers.extend((len(copy.start), *copy.source_start, *copy.start, *copy.size))
            names += (copy.hf_name, copy.name, *copy.source_names)
        digest.update(numbers.tobytes())
        digest.update("\n".join(names).encode())
    return digest.hexdigest()
