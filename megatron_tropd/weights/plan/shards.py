"""Which source ranks hold which part of each HF tensor, and which part of it a destination needs.  Integers only."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from megatron_tropd.weights.coordinates.box import Box, ParamBoxes
from megatron_tropd.weights.coordinates.hf_shapes import Index


class PlanError(ValueError):
    """Weights cannot be planned; the message names the tensor and what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A parameter that holds one shard, equal on all of ``ranks``."""

    ranks: tuple[int, ...]
    names: tuple[str, ...]
    local_start: Index


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The part of one destination box that one shard provides."""

    holders: tuple[Holder, ...]
    offset: Index
    """Where it begins in the shard; add to a holder's ``local_start``."""
    start: Index
    """Where it lies in the destination parameter."""
    size: Index

    @property
    def numel(self) -> int:
        """Elements in the piece."""
        return prod(self.size)

    def split(self, hf_name: str, max_elements: int) -> Iterator[Piece]:
        """Yield the piece in groups of rows with at most ``max_elements`` elements each.

        Raises:
            PlanError: a single row is larger.
        """
        if self.numel <= max_elements:
            yield self
            return
        rows = max_elements // prod(self.size[1:])
        if rows < 1:
            raise PlanError(
                f"one row of {hf_name} has {prod(self.size[1:])} elements, half a bucket holds {max_elements}; "
                "raise the bucket size"
            )
        stacked = len(self.start) - len(self.size)
        for row in range(0, self.size[0], rows):
            start = list(self.start)
            start[stacked] += row
            yield Piece(
                holders=self.holders, offset=(self.offset[0] + row, *self.offset[1:]), start=tuple(start),
                size=(min(rows, self.size[0] - row), *self.size[1:]),
            )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorShards:
    """One HF tensor cut along ``axis`` into shards with consecutive rows (or columns)."""

    axis: int
    starts: tuple[int, ...]
    ends: tuple[int, ...]
    holders: tuple[tuple[Holder, ...], ...]
    """By shard: every parameter that holds it."""

    def pieces(self, box: Box) -> Iterator[Piece]:
        """Yield the parts of ``box``, one per shard, in order."""
        axis, stacked = self.axis, len(box.local_start) - len(box.size)
        low, high = box.start[axis], box.start[axis] + box.size[axis]
        position = low
        for number in range(bisect_right(self.starts, low) - 1, len(self.starts)):
            begin, end = max(low, self.starts[number]), min(high, self.ends[number])
            if begin >= end:
                return
            where, length, start = list(box.start), list(box.size), list(box.local_start)
            where[axis] = begin - self.starts[number]
            length[axis] = end - begin
            start[stacked + axis] += begin - position
            yield Piece(holders=self.holders[number], offset=tuple(where), start=tuple(start), size=tuple(length))


def source_shards(
    shapes: Mapping[str, Index], sources: Iterable[tuple[Sequence[int], Sequence[ParamBoxes]]]
) -> dict[str, TensorShards]:
    """Return the shards of every tensor in ``shapes``.

    Args:
        shapes: HF name -> shape of the whole tensor.
        sources: (ranks, their parameters) for every set of ranks that hold the same parameters.

    Raises:
        PlanError: a tensor that no rank holds, or of which the ranks do not hold every element, or which
            is cut in more than one direction.
    """
    found: dict[str, dict[tuple[Index, Index], list[Holder]]] = {name: {} for name in shapes}
    for ranks, params in sources:
        for param in params:
            for box in param.boxes:
                if box.hf_name not in found:
                    raise PlanError(f"{box.hf_name} (in {param.names[0]} on rank {ranks[0]}) is no tensor of the model")
                holder = Holder(ranks=tuple(ranks), names=param.names, local_start=box.local_start)
                found[box.hf_name].setdefault((box.start, box.size), []).append(holder)
    return {name: _cut(name, shapes[name], shards) for name, shards in found.items()}


def _cut(name: str, shape: Index, shards: dict[tuple[Index, Index], list[Holder]]) -> TensorShards:
    """Check that the shards tile the tensor along one axis, and return them in order."""
    if not shards:
        raise PlanError(f"no source rank holds {name}")
    cut = {axis for _, size in shards for axis, extent in enumerate(size) if extent != shape[axis]}
    if len(cut) > 1:
        raise PlanError(f"{name} is cut along axes {sorted(cut)} at once; one is supported")
    axis = cut.pop() if cut else 0
    ordered = sorted(shards, key=lambda shard: shard[0][axis])
    end = 0
    for start, size in ordered:
        if start[axis] != end:
            what = "no source rank holds" if start[axis] > end else "source ranks hold overlapping shards with"
            low, high = sorted((end, start[axis]))
            raise PlanError(f"{what} indices {low} to {high - 1} of axis {axis} of {name}")
        end = start[axis] + size[axis]
    if end != shape[axis]:
        raise PlanError(f"no source rank holds indices {end} to {shape[axis] - 1} of axis {axis} of {name}")
    return TensorShards(
        axis=axis,
        starts=tuple(start[axis] for start, _ in ordered),
        ends=tuple(start[axis] + size[axis] for start, size in ordered),
        holders=tuple(tuple(shards[shard]) for shard in ordered),
    )
