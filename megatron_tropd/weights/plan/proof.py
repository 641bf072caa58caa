"""Check that a plan delivers every weight, copy by copy and without the planner.

The planner intersects boxes and cuts them into pieces; the proof goes the other way.  It traces each copy from its
source parameter to HF coordinates, and from its destination parameter to HF coordinates; both must be the same
rectangle of the same tensor.  The rectangles that arrive in a destination box must tile it.  No rank may stage more
than half a plan's ``bucket_bytes`` in one bucket.  A plan's placements and digest are not checked.

The proof and the planner share one thing: both take the boxes of trainer ranks and engine ranks from
``weights/coordinates``.  A wrong box would be wrong in both, and the proof could not find it.  The boxes are therefore
tested against the real modules: Megatron's, loaded from HF files and compared with transformers
(tests/test_model_parity.py, tests/test_weights_oracle.py), and SGLang's, whose own loaders fill them
(tests/test_sglang_modules.py).  The proof also checks what it can of the boxes themselves: they lie inside their
tensors and parameters, they do not overlap, and the ranks of an engine hold the whole model.  It uses none of the
planner's code for the intersection of boxes, the choice of senders and the buckets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.box import Box, ParamBoxes
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout, engine_boxes
from megatron_tropd.weights.coordinates.hf_shapes import Index, hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.plan.types import Copy, WeightPlan

MESSAGE_HEADER_BYTES = 64
VOCABULARY_TABLES = ("model.embed_tokens.weight", "lm_head.weight")


class ProofError(ValueError):
    """A plan would not deliver the weights; the message names the tensor, the engine and the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProof:
    """Totals of a plan that passed every check."""

    copies: int
    parameters: int
    """Destination parameters, over all engines and ranks."""
    bytes_needed: int
    """Bytes of all destination elements that are not padding."""
    bytes_sent: int
    padding_elements: int
    """Destination elements that no copy writes: rows beyond the vocabulary, feed-forward padding of CPU engines."""
    staging_bytes: int
    """The most that one rank sends or receives in one bucket, headers included."""

    @property
    def redundancy(self) -> float:
        """Bytes sent per byte needed; 1 for every plan that passes."""
        return self.bytes_sent / self.bytes_needed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Area:
    """A box as plain corners, with a number that is unique on its rank."""

    number: int
    hf_name: str
    hf_low: Index
    low: Index
    high: Index


_AreasByName = dict[str, dict[Index, list[_Area]]]
"""Parameter name -> position in its stack (empty for most) -> areas."""


def _volume(low: Sequence[int], high: Sequence[int]) -> int:
    volume = 1
    for begin, end in zip(low, high, strict=True):
        volume *= max(0, end - begin)
    return volume


def _area(number: int, box: Box) -> tuple[Index, _Area]:
    depth = len(box.local_start) - len(box.start)
    low = box.local_start[depth:]
    high = tuple(begin + extent for begin, extent in zip(low, box.size, strict=True))
    return box.local_start[:depth], _Area(number=number, hf_name=box.hf_name, hf_low=box.start, low=low, high=high)


def _areas_by_name(params: Iterable[ParamBoxes]) -> _AreasByName:
    areas_of: _AreasByName = {}
    number = 0
    for param in params:
        stacks: dict[Index, list[_Area]] = {}
        for box in param.boxes:
            stack, area = _area(number, box)
            stacks.setdefault(stack, []).append(area)
            number += 1
        for name in param.names:
            areas_of[name] = stacks
    return areas_of


def _trace(areas: Iterable[_Area], low: Index, high: Index) -> tuple[_Area, Index] | None:
    """Return the area that contains a rectangle and the rectangle's first HF corner; None if there is no such area."""
    for area in areas:
        if all(a <= b and c <= d for a, b, c, d in zip(area.low, low, high, area.high, strict=True)):
            return area, tuple(hf + at - base for hf, at, base in zip(area.hf_low, low, area.low, strict=True))
    return None


def _paint(rectangles: Sequence[tuple[Index, Index]], low: Index, high: Index) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the lines of a grid (all edges of rectangles and area) and how often each of its cells is covered."""
    edges = [
        np.unique([corner[axis] for pair in (*rectangles, (low, high)) for corner in pair]) for axis in range(len(low))
    ]
    painted = np.zeros([len(line) - 1 for line in edges], np.int64)
    for begin, end in rectangles:
        cells = tuple(
            slice(*np.searchsorted(line, (b, e)).tolist()) for line, b, e in zip(edges, begin, end, strict=True)
        )
        painted[cells] += 1
    return edges, painted


def _overlap(a: tuple[Index, Index], b: tuple[Index, Index]) -> bool:
    return all(max(p, q) < min(r, s) for p, q, r, s in zip(a[0], b[0], a[1], b[1], strict=True))


def _tiles(rectangles: Sequence[tuple[Index, Index]], low: Index, high: Index) -> str:
    """Return how rectangles fail to cover every element of an area exactly once; empty when they do not fail."""
    if len(rectangles) == 1 and rectangles[0] == (low, high):
        return ""
    edges, painted = _paint(rectangles, low, high)
    for wrong, what in ((painted == 0, "written by no copy"), (painted > 1, "written more than once")):
        if wrong.any():
            cell = np.argwhere(wrong)[0]
            return f"elements from {[int(line[at]) for line, at in zip(edges, cell, strict=True)]} on are {what}"
    return ""


def _padding(params: Sequence[ParamBoxes], shapes: Mapping[str, Index], where: str, *, pads_mlp: bool) -> int:
    """Return the number of elements without a box.  Check that boxes are disjoint, and that only vocabulary rows (and
    feed-forward padding of an engine that has it) are without one."""
    total = 0
    for param in params:
        for box in param.boxes:
            shape = shapes.get(box.hf_name)
            if shape is None or any(a + n > s for a, n, s in zip(box.start, box.size, shape, strict=True)):
                raise ProofError(f"{param.names[0]} on {where} has a box outside the HF tensor {box.hf_name}")
        stacks: dict[Index, list[tuple[Index, Index]]] = {}
        for box in param.boxes:
            stack, area = _area(0, box)
            stacks.setdefault(stack, []).append((area.low, area.high))
        held = sum(_volume((0,) * len(box.size), box.size) for box in param.boxes)
        free = _volume((0,) * len(param.shape), param.shape) - held
        is_table = param.names[0] in VOCABULARY_TABLES
        if free and not (is_table or (pads_mlp and ".mlp." in param.names[0])):
            raise ProofError(f"{param.names[0]} on {where} has {free} elements without a box")
        for stack, rectangles in stacks.items():
            inner = param.shape[len(stack) :]
            if any(end > extent for _, high in rectangles for end, extent in zip(high, inner, strict=True)):
                raise ProofError(f"{param.names[0]} on {where} has a box beyond its shape {list(param.shape)}")
            if any(_overlap(a, b) for a, b in combinations(rectangles, 2)):
                raise ProofError(f"{param.names[0]} {list(stack)} on {where} has elements in two boxes")
            if is_table and (reason := _tiles(rectangles, (0, 0), (inner[0] - free // inner[1], inner[1]))):
                raise ProofError(f"the boxes of {param.names[0]} on {where} are wrong: {reason}")
        total += free
    return total


def _check_engine_is_whole(
    params_of_ranks: Sequence[Sequence[ParamBoxes]], shapes: Mapping[str, Index], engine: int
) -> None:
    """Check that the ranks of an engine together hold every element of the model."""
    held: dict[str, set[tuple[Index, Index]]] = {name: set() for name in shapes}
    for params in params_of_ranks:
        for box in (box for param in params for box in param.boxes):
            end = tuple(begin + extent for begin, extent in zip(box.start, box.size, strict=True))
            held[box.hf_name].add((box.start, end))
    for name, shape in shapes.items():
        if reason := _tiles(sorted(held[name]), (0,) * len(shape), shape):
            raise ProofError(f"the ranks of engine {engine} do not hold {name} once: {reason}")


class _PlanTrace:
    """Checks the copies of a plan one by one and records where they land."""

    def __init__(
        self, plan: WeightPlan, sources: Mapping[int, _AreasByName], targets: Mapping[tuple[int, int], _AreasByName]
    ):
        self.itemsize = plan.itemsize
        self.sources, self.targets = sources, targets
        self.landed: dict[tuple[int, int], dict[int, list[tuple[Index, Index]]]] = {key: {} for key in targets}
        self.bytes_sent = self.copies = 0

    def _source_corner(self, copy: Copy, where: str) -> tuple[str, Index]:
        areas_of = self.sources.get(copy.source)
        if areas_of is None:
            raise ProofError(f"{where}: source rank {copy.source} does not exist")
        names = [name for name in copy.source_names if name in areas_of]
        if not names:
            raise ProofError(f"{where}: source rank {copy.source} has no parameter {' / '.join(copy.source_names)}")
        low = copy.source_start
        if len(low) != len(copy.size):
            raise ProofError(f"{where}: the source rectangle has {len(low)} corners and {len(copy.size)} sides")
        high = tuple(begin + extent for begin, extent in zip(low, copy.size, strict=True))
        found = (
            _trace(areas_of[names[0]].get((), ()), low, high) if len({id(areas_of[n]) for n in names}) == 1 else None
        )
        if found is None:
            raise ProofError(f"{where}: source rank {copy.source} does not own {names[0]}{list(low)} to {list(high)}")
        return found[0].hf_name, found[1]

    def record(self, copy: Copy) -> None:
        """Check one copy and note where it lands."""
        key = (copy.engine, copy.engine_rank)
        where = f"{copy.name} ({copy.hf_name}) of engine {copy.engine} rank {copy.engine_rank}"
        if key not in self.targets:
            raise ProofError(f"{where}: there is no such engine rank")
        depth = len(copy.start) - len(copy.size)
        stack, low = copy.start[: max(depth, 0)], copy.start[max(depth, 0) :]
        areas = self.targets[key].get(copy.name, {}).get(stack)
        if depth < 0 or areas is None or len(areas[0].low) != len(low) or min(copy.size) < 1:
            raise ProofError(f"{where}: no such parameter, position {list(copy.start)}, size {list(copy.size)}")
        high = tuple(begin + extent for begin, extent in zip(low, copy.size, strict=True))
        found = _trace(areas, low, high)
        if found is None:
            raise ProofError(f"{where}: {list(copy.start)} + {list(copy.size)} is padding, or more than one tensor")
        area, hf_corner = found
        origin = self._source_corner(copy, where)
        if origin != (area.hf_name, hf_corner) or copy.hf_name != area.hf_name:
            raise ProofError(
                f"{where}: expects {area.hf_name}{list(hf_corner)}, source rank {copy.source} would send "
                f"{origin[0]}{list(origin[1])}"
            )
        if copy.num_bytes != _volume(low, high) * self.itemsize:
            raise ProofError(f"{where}: {copy.num_bytes} bytes for {_volume(low, high)} elements of {self.itemsize}")
        self.landed[key].setdefault(area.number, []).append((low, high))
        self.bytes_sent += copy.num_bytes
        self.copies += 1

    def check_landed(self, key: tuple[int, int]) -> int:
        """Check that every box of an engine rank is written exactly once; return the number of their elements."""
        elements = 0
        for name, stacks in self.targets[key].items():
            for area in (area for areas in stacks.values() for area in areas):
                if reason := _tiles(self.landed[key].get(area.number, []), area.low, area.high):
                    raise ProofError(f"{name} ({area.hf_name}) of engine {key[0]} rank {key[1]}: {reason}")
                elements += _volume(area.low, area.high)
        return elements


def _check_staging(plan: WeightPlan) -> int:
    """Check that no rank stages more than half its memory in a bucket, and that a pair has one message per bucket.

    Return the most bytes that one rank stages in one bucket.
    """
    staged: dict[tuple[object, int], int] = {}
    seen: set[tuple[int, int, int, int]] = set()
    for message in plan.messages:
        key = (message.bucket, message.source, message.engine, message.engine_rank)
        if key in seen or not message.copies:
            raise ProofError(f"bucket {key[0]}: two messages, or an empty one, from rank {key[1]} to engine {key[2:]}")
        seen.add(key)
        for copy in message.copies:
            if (copy.source, copy.engine, copy.engine_rank) != key[1:]:
                raise ProofError(f"{copy.name} of engine {copy.engine} rank {copy.engine_rank} is in another's message")
        size = MESSAGE_HEADER_BYTES + sum(copy.num_bytes for copy in message.copies)
        for rank in (message.source, (message.engine, message.engine_rank)):
            staged[rank, message.bucket] = staged.get((rank, message.bucket), 0) + size
    worst = max(staged.values(), default=0)
    if worst > plan.bucket_bytes // 2:
        raise ProofError(f"a rank stages {worst} bytes in one bucket; half of {plan.bucket_bytes} was promised")
    return worst


def prove(plan: WeightPlan, arch: Architecture, layout: ParallelLayout) -> PlanProof:
    """Check that ``plan`` writes every element of every engine once, from a rank that holds it.

    Raises:
        ProofError: it does not; the message names the tensor, the engine and the rank.
    """
    shapes = hf_shapes(arch)
    held: dict[tuple[int, ...], _AreasByName] = {}
    sources: dict[int, _AreasByName] = {}
    for rank in range(layout.world_size):
        c = layout.coords(rank)
        if (c.tp, c.pp, c.etp, c.ep) not in held:
            held[c.tp, c.pp, c.etp, c.ep] = _areas_by_name(rank_boxes(arch, layout, rank))
        sources[rank] = held[c.tp, c.pp, c.etp, c.ep]
    targets: dict[tuple[int, int], _AreasByName] = {}
    of_layout: dict[EngineLayout, list[tuple[_AreasByName, int, int]]] = {}
    padding = parameters = 0
    for engine, cut in enumerate(plan.engines):
        if cut not in of_layout:
            params = [engine_boxes(arch, cut, rank) for rank in range(cut.tp)]
            _check_engine_is_whole(params, shapes, engine)
            of_layout[cut] = [
                (_areas_by_name(p), len(p), _padding(p, shapes, f"engine {engine} rank {rank}", pads_mlp=cut.cpu))
                for rank, p in enumerate(params)
            ]
        for rank, (areas_of, number, free) in enumerate(of_layout[cut]):
            targets[engine, rank] = areas_of
            parameters, padding = parameters + number, padding + free
    staging = _check_staging(plan)
    trace = _PlanTrace(plan, sources, targets)
    for message in plan.messages:
        for copy in message.copies:
            trace.record(copy)
    needed = sum(trace.check_landed(key) for key in targets) * plan.itemsize
    if trace.bytes_sent != needed:
        raise ProofError(f"the plan sends {trace.bytes_sent} bytes, {needed} are needed")
    return PlanProof(
        copies=trace.copies, parameters=parameters, bytes_needed=needed, bytes_sent=trace.bytes_sent,
        padding_elements=padding, staging_bytes=staging,
    )  # fmt: skip
