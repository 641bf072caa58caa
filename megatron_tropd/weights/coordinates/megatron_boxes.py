"""Which part of which Hugging Face tensor every Megatron rank holds.  Integers only: no tensors, no process group.

Loading, exporting and resharding all read this one description, so that no layout rule is written twice.
Padded vocabulary rows belong to no box: they are never read from a file and never sent anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.weight_table import (
    EMBEDDING_RULE,
    FINAL_NORM_RULE,
    OUTPUT_RULE,
    TIED_OUTPUT_RULE,
    Split,
    WeightRule,
)
from megatron_tropd.parallel.layout import ParallelLayout, RankCoords
from megatron_tropd.weights.coordinates.box import Box, ParamBoxes, ShapeAndBoxes, block, column_block
from megatron_tropd.weights.coordinates.hf_shapes import Index, hf_shape, hf_shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedBox:
    """A box and the one rank that sends it."""

    rank: int
    names: tuple[str, ...]
    """Names of the parameter on that rank, as in :class:`ParamBoxes`."""
    box: Box


def _replicated(arch: Architecture, names: tuple[str, ...], parts: int, part: int) -> ShapeAndBoxes:
    shape = hf_shape(arch, names[0])
    return shape, [block(names[0], 0, shape, 0)]


def _columns(arch: Architecture, names: tuple[str, ...], parts: int, part: int) -> ShapeAndBoxes:
    box = column_block(names[0], hf_shape(arch, names[0]), parts, part)
    return box.size, [box]


def _gate_up(arch: Architecture, names: tuple[str, ...], parts: int, part: int) -> ShapeAndBoxes:
    rows, hidden = hf_shape(arch, names[0])
    size = (rows // parts, hidden)
    boxes = [block(name, part * size[0], size, number * size[0]) for number, name in enumerate(names)]
    return (len(names) * size[0], hidden), boxes


def _qkv(arch: Architecture, names: tuple[str, ...], parts: int, part: int) -> ShapeAndBoxes:
    """Return shape and boxes of one rank's share of [q_0..q_r-1, k, v], the rows of a query group (weight or bias).

    The groups lie one after the other, and their rows are cut evenly.

    With more ranks than groups a cut goes through a group, as in Megatron, which gathers the activations of
    a group, not its weights.
    """
    rest = hf_shape(arch, names[0])[1:]
    q_rows = arch.num_attention_heads // arch.num_query_groups * arch.head_dim
    runs = [(0, names[0], q_rows), (q_rows, names[1], arch.head_dim), (q_rows + arch.head_dim, names[2], arch.head_dim)]
    group_rows = q_rows + 2 * arch.head_dim
    rows = group_rows * arch.num_query_groups // parts
    first, last = part * rows, (part + 1) * rows
    boxes = []
    for group in range(first // group_rows, -(-last // group_rows)):
        for offset, name, length in runs:
            start = group * group_rows + offset
            low, high = max(first, start), min(last, start + length)
            if low < high:
                boxes.append(block(name, group * length + low - start, (high - low, *rest), low - first))
    return (rows, *rest), boxes


def _vocab(arch: Architecture, name: str, layout: ParallelLayout, tp_rank: int) -> ShapeAndBoxes:
    """Return this rank's part of the padded table and the box of its real rows; none if all rows are padding."""
    rows = layout.padded_vocab_size(arch.vocab_size) // layout.tp
    first = tp_rank * rows
    real = min(rows, arch.vocab_size - first)
    boxes = [block(name, first, (real, arch.hidden_size), 0)] if real > 0 else []
    return (rows, arch.hidden_size), boxes


_SPLITS: dict[Split, Callable[[Architecture, tuple[str, ...], int, int], ShapeAndBoxes]] = {
    Split.REPLICATED: _replicated, Split.COLUMNS: _columns, Split.GATE_UP: _gate_up, Split.QKV: _qkv,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _RuleInstance:
    """A rule at one layer (and expert) of one model chunk."""

    rule: WeightRule
    layer: int = 0
    local_layer: int = 0
    expert: int | None = None
    local_expert: int = 0


def _chunk_rules(arch: Architecture, layout: ParallelLayout, coords: RankCoords, chunk: int) -> Iterator[_RuleInstance]:
    """Yield every parameter of one model chunk, in the order of the model."""
    if coords.pp == 0 and chunk == 0:
        yield _RuleInstance(rule=EMBEDDING_RULE)
    per_rank = arch.num_experts // layout.ep
    for local, layer in enumerate(layout.stage_layers(arch.num_layers, coords.pp, chunk)):
        for rule in arch.layer_rules():
            yield _RuleInstance(rule=rule, layer=layer, local_layer=local)
        for number in range(per_rank):
            for rule in arch.expert_rules():
                yield _RuleInstance(
                    rule=rule, layer=layer, local_layer=local, expert=coords.ep * per_rank + number,
                    local_expert=number,
                )  # fmt: skip
    if coords.pp == layout.pp - 1 and chunk == layout.chunks - 1:
        yield _RuleInstance(rule=FINAL_NORM_RULE)
        if not arch.tie_word_embeddings:
            yield _RuleInstance(rule=OUTPUT_RULE)
        elif layout.pp > 1:  # a second copy of the embedding; with one stage the module reuses the first
            yield _RuleInstance(rule=TIED_OUTPUT_RULE)


def rank_boxes(arch: Architecture, layout: ParallelLayout, rank: int) -> tuple[ParamBoxes, ...]:
    """Return every parameter of the GPTModel on ``rank``, of all its chunks.

    Raises:
        ValueError: the weights cannot be cut by this layout; the message names the flags.
    """
    if errors := arch.cut_errors(**layout.cut):
        raise ValueError("; ".join(errors))
    coords = layout.coords(rank)
    params = []
    for chunk in range(layout.chunks):
        prefix = f"model{chunk}." if layout.chunks > 1 else ""
        for placed in _chunk_rules(arch, layout, coords, chunk):
            rule, is_expert = placed.rule, placed.expert is not None
            hf_names = tuple(name.format(layer=placed.layer, expert=placed.expert) for name in rule.hf)
            if rule.split is Split.VOCAB:
                shape, boxes = _vocab(arch, hf_names[0], layout, coords.tp)
            else:
                parts, part = (layout.expert_tp, coords.etp) if is_expert else (layout.tp, coords.tp)
                shape, boxes = _SPLITS[rule.split](arch, hf_names, parts, part)
            names = tuple(
                prefix + name.format(layer=placed.local_layer, expert=placed.local_expert) for name in rule.megatron
            )
            params.append(ParamBoxes(names=names, shape=shape, boxes=tuple(boxes)))
    return tuple(params)


def owners(arch: Architecture, layout: ParallelLayout) -> tuple[OwnedBox, ...]:
    """Return one sender for every region of the HF model: each HF element is in exactly one of these boxes.

    Replicas (data or context parallel, tensor parallel norms, experts of another expert-data rank, the tied
    output table of the last stage) hold boxes with equal coordinates; the lowest rank that holds one sends
    it.  The boxes are sorted by HF tensor in the order of :func:`hf_shapes`, then by rank; equal on every rank.
    """
    order = {name: number for number, name in enumerate(hf_shapes(arch))}
    seen: set[tuple[str, Index]] = set()
    owned: list[OwnedBox] = []
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        if (coords.dp or coords.cp) and not arch.num_experts:
            continue  # a whole replica of a lower rank
        for param in rank_boxes(arch, layout, rank):
            for box in param.boxes:
                if (box.hf_name, box.start) not in seen:
                    seen.add((box.hf_name, box.start))
                    owned.append(OwnedBox(rank=rank, names=param.names, box=box))
    return tuple(sorted(owned, key=lambda item: (order[item.box.hf_name], item.rank)))
