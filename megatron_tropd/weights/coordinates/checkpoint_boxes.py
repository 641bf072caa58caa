"""Where every parameter lies in a Megatron ``torch_dist`` checkpoint.  Integers only, as in ``box.py``.

Such a checkpoint has no layout: every parameter of every layer (and expert) is one rectangle of a global
tensor.  Layers are stacked along a leading dimension, experts along a second one; query, key and value
rows lie interleaved by query group, gate rows before up rows, and the vocabulary is padded.  The only rank of
a 1 x 1 layout holds the same parameters, so its boxes are the whole map between HF files and checkpoints.
A checkpoint may be *cut* into chunks of any size; cutting where a target layout cuts lets each of its ranks
read its own bytes and no others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.box import Box, ParamBoxes
from megatron_tropd.weights.coordinates.hf_shapes import Index
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(linear_fc\d)\.weight(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredParam:
    """One parameter of one layer (of one expert) inside its global tensor."""

    key: str
    """Name of the global tensor, as ``sharded_state_dict`` gives it."""
    at: Index
    """Index along the leading dimensions: (), (layer,) or (layer, expert)."""
    of: Index
    """Sizes of those dimensions."""
    shape: Index
    """Shape of the parameter itself, vocabulary padding included."""
    boxes: tuple[Box, ...]
    """HF rectangles, each of whole rows, in the order of the rows they fill."""
    cut: Index
    """Sizes of a target rank's pieces: no stored chunk crosses a multiple of them."""

    @property
    def global_shape(self) -> Index:
        """Shape of the global tensor."""
        return (*self.of, *self.shape)

    @property
    def numel(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.shape)

    @property
    def real_rows(self) -> int:
        """Number of rows that HF tensors fill; a padded vocabulary table has more rows."""
        return max(box.local_start[0] + box.size[0] for box in self.boxes)

    @property
    def may_be_padded(self) -> bool:
        """Whether this is a vocabulary table."""
        return not self.of and len(self.shape) == 2

    def bands(self, max_rows: int) -> Iterator[range]:
        """Yield consecutive ranges of rows, none longer than ``max_rows`` (at least 1) and none across a cut."""
        for first in range(0, self.shape[0], self.cut[0]):
            rows = min(self.cut[0], self.shape[0] - first)
            step = -(-rows // -(-rows // max(1, max_rows)))  # ranges as equal in length as possible
            for start in range(first, first + rows, step):
                yield range(start, min(start + step, first + rows))


def _place(names: Sequence[str], arch: Architecture) -> tuple[str, Index, Index]:
    """Return (key, at, of) of the parameter whose name in a GPTModel is ``names[0]``."""
    layer = _LAYER.fullmatch(names[0])
    if layer is None:
        return names[0], (), ()
    number, rest = int(layer[1]), layer[2]
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        return f"decoder.layers.{rest}", (number,), (arch.num_layers,)
    key = f"decoder.layers.mlp.experts.experts.{expert[1]}.weight"
    return key, (number, int(expert[2])), (arch.num_layers, arch.num_experts)


def _cut(whole: ParamBoxes, part: ParamBoxes) -> Index:
    """Return the sizes of the runs of ``whole`` that make up ``part``, the first target rank's parameter."""
    place = {(box.hf_name, box.start): box.local_start[0] for box in whole.boxes}
    run = part.shape[0]
    for box in part.boxes:
        if place[box.hf_name, box.start] != box.local_start[0]:  # gate and up: the rank's rows are two runs
            run = box.local_start[0]
            break
    return (run, *part.shape[1:])


def stored_params(arch: Architecture, layout: ParallelLayout) -> tuple[StoredParam, ...]:
    """Return every parameter of the model, padded and cut for the TP and expert-TP sizes of ``layout``.

    Raises:
        ValueError: the model cannot be cut that way.
    """
    divisor = math.lcm(layout.make_vocab_size_divisible_by, layout.tp)
    whole = rank_boxes(arch, ParallelLayout(make_vocab_size_divisible_by=divisor), 0)
    one_stage = ParallelLayout(tp=layout.tp, etp=layout.etp, make_vocab_size_divisible_by=divisor)
    part = rank_boxes(arch, one_stage, 0)
    params = []
    for mine, target in zip(whole, part, strict=True):
        key, at, of = _place(mine.names, arch)
        boxes = tuple(sorted(mine.boxes, key=lambda box: box.local_start))
        params.append(StoredParam(key=key, at=at, of=of, shape=mine.shape, boxes=boxes, cut=_cut(mine, target)))
    return tuple(params)


def by_hf_tensor(params: Sequence[StoredParam]) -> dict[str, list[tuple[StoredParam, Box]]]:
    """Return, for every HF tensor, its boxes with the parameters that store them, in the order of its rows."""
    found: dict[str, list[tuple[StoredParam, Box]]] = {}
    for param in params:
        for box in param.boxes:
            found.setdefault(box.hf_name, []).append((param, box))
    return {name: sorted(pairs, key=lambda pair: pair[1].start) for name, pairs in found.items()}
