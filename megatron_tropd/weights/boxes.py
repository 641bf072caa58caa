"""Which part of which Hugging Face tensor every Megatron rank holds.  Integers only: no tensors, no process group.

A *box* is a rectangle of an HF tensor.  A Megatron parameter on one rank is a set of boxes, each with
the place it takes inside the local parameter.  Loading, exporting and resharding all read this one
description, so that no layout rule is written twice.  Padded vocabulary rows belong to no box: they
are never read from a file and never sent anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tropd.models.architecture import (
    EMBEDDING_RULE,
    FINAL_NORM_RULE,
    OUTPUT_RULE,
    TIED_OUTPUT_RULE,
    Architecture,
    Split,
    WeightRule,
)
from megatron_tropd.parallel.layout import ParallelLayout

LM_HEAD = "lm_head.weight"
EMBED_TOKENS = "model.embed_tokens.weight"
DEFAULT_VOCAB_DIVISOR = 128

Index = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle of one HF tensor and where it lies in a local parameter.  One entry per dimension."""

    hf_name: str
    start: Index
    size: Index
    local_start: Index

    @property
    def numel(self) -> int:
        """Elements in the box."""
        count = 1
        for extent in self.size:
            count *= extent
        return count

    @property
    def hf_slices(self) -> tuple[slice, ...]:
        """Index of the box in the HF tensor."""
        return tuple(slice(s, s + n) for s, n in zip(self.start, self.size, strict=True))

    @property
    def local_slices(self) -> tuple[slice, ...]:
        """Index of the box in the local parameter."""
        return tuple(slice(s, s + n) for s, n in zip(self.local_start, self.size, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamBoxes:
    """One parameter of one rank's GPTModel."""

    names: tuple[str, ...]
    """What the GPTModel may call it (Transformer Engine spec first), with the layer index LOCAL to the stage."""
    shape: Index
    """Local shape, vocabulary padding included."""
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnedBox:
    """A box and the one rank that sends it."""

    rank: int
    names: tuple[str, ...]
    """Names of the parameter on that rank, as in :class:`ParamBoxes`."""
    box: Box


def _q_rows(arch: Architecture) -> int:
    return arch.num_attention_heads * arch.head_dim


def _kv_rows(arch: Architecture) -> int:
    return arch.num_query_groups * arch.head_dim


def _hf_shape(arch: Architecture, hf_name: str) -> Index:
    """Shape of an HF tensor, found by the end of its name."""
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    module, kind = hf_name.split(".")[-2:]
    rows_cols: dict[str, tuple[int, int]] = {
        "embed_tokens": (arch.vocab_size, hidden),
        "lm_head": (arch.vocab_size, hidden),
        "q_proj": (_q_rows(arch), hidden),
        "k_proj": (_kv_rows(arch), hidden),
        "v_proj": (_kv_rows(arch), hidden),
        "o_proj": (hidden, _q_rows(arch)),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
    }
    if module in rows_cols:
        return rows_cols[module] if kind == "weight" else rows_cols[module][:1]
    if module in ("q_norm", "k_norm"):
        return (arch.head_dim,)
    if module in ("input_layernorm", "post_attention_layernorm", "norm"):
        return (hidden,)
    raise KeyError(f"no shape is known for the HF tensor {hf_name}; teach weights/boxes.py")


def _model_rules(arch: Architecture) -> Iterator[tuple[WeightRule, int]]:
    """Every rule of the whole model with its global layer (0 outside the layers), in HF reading order."""
    yield EMBEDDING_RULE, 0
    for layer in range(arch.num_layers):
        for rule in arch.layer_rules():
            yield rule, layer
    yield FINAL_NORM_RULE, 0
    if not arch.tie_word_embeddings:
        yield OUTPUT_RULE, 0


def hf_shapes(arch: Architecture) -> dict[str, Index]:
    """Name and shape of every tensor of the HF checkpoint, without ``lm_head.weight`` when it is tied."""
    return {
        name: _hf_shape(arch, name)
        for rule, layer in _model_rules(arch)
        for name in (template.format(layer=layer) for template in rule.hf)
    }


def _block(hf_name: str, hf_start: int, size: Index, local_start: int) -> Box:
    """A box of whole rows: ``size`` from row ``hf_start``, placed at row ``local_start``."""
    rest = (0,) * (len(size) - 1)
    return Box(hf_name=hf_name, start=(hf_start, *rest), size=size, local_start=(local_start, *rest))


def _replicated(arch: Architecture, names: tuple[str, ...], tp: int, tp_rank: int) -> tuple[Index, list[Box]]:
    (name,) = names
    shape = _hf_shape(arch, name)
    return shape, [_block(name, 0, shape, 0)]


def _columns(arch: Architecture, names: tuple[str, ...], tp: int, tp_rank: int) -> tuple[Index, list[Box]]:
    (name,) = names
    rows, columns = _hf_shape(arch, name)
    shape = (rows, columns // tp)
    return shape, [Box(hf_name=name, start=(0, tp_rank * shape[1]), size=shape, local_start=(0, 0))]


def _gate_up(arch: Architecture, names: tuple[str, ...], tp: int, tp_rank: int) -> tuple[Index, list[Box]]:
    rows = arch.ffn_hidden_size // tp
    size = (rows, arch.hidden_size)
    boxes = [_block(name, tp_rank * rows, size, part * rows) for part, name in enumerate(names)]
    return (len(names) * rows, arch.hidden_size), boxes


def _qkv(arch: Architecture, names: tuple[str, ...], tp: int, tp_rank: int) -> tuple[Index, list[Box]]:
    """Rows [q_0..q_r-1, k, v] of each query group of this rank (weight or bias)."""
    groups = arch.num_query_groups // tp
    q_rows = _q_rows(arch) // arch.num_query_groups
    part_rows = (q_rows, arch.head_dim, arch.head_dim)
    rest = _hf_shape(arch, names[0])[1:]
    boxes, local_row = [], 0
    for group in range(tp_rank * groups, (tp_rank + 1) * groups):
        for name, rows in zip(names, part_rows, strict=True):
            boxes.append(_block(name, group * rows, (rows, *rest), local_row))
            local_row += rows
    return (local_row, *rest), boxes


def _vocab(
    arch: Architecture, names: tuple[str, ...], layout: ParallelLayout, tp_rank: int, divisor: int
) -> tuple[Index, list[Box]]:
    """Rows of the padded table that are real rows; a rank of nothing but padding has no box."""
    (name,) = names
    rows = layout.padded_vocab_size(arch.vocab_size, divisor) // layout.tp
    first = tp_rank * rows
    real = min(rows, arch.vocab_size - first)
    boxes = [_block(name, first, (real, arch.hidden_size), 0)] if real > 0 else []
    return (rows, arch.hidden_size), boxes


_CUTS = {Split.REPLICATED: _replicated, Split.COLUMNS: _columns, Split.GATE_UP: _gate_up, Split.QKV: _qkv}


def _stage_rules(arch: Architecture, layout: ParallelLayout, stage: int) -> Iterator[tuple[WeightRule, int, int]]:
    """(rule, global layer, local layer) of one pipeline stage."""
    if stage == 0:
        yield EMBEDDING_RULE, 0, 0
    for local, layer in enumerate(layout.stage_layers(arch.num_layers, stage)):
        for rule in arch.layer_rules():
            yield rule, layer, local
    if stage == layout.pp - 1:
        yield FINAL_NORM_RULE, 0, 0
        if not arch.tie_word_embeddings:
            yield OUTPUT_RULE, 0, 0
        elif layout.pp > 1:  # a second copy of the embedding; with one stage the module reuses the first
            yield TIED_OUTPUT_RULE, 0, 0


def rank_boxes(
    arch: Architecture, layout: ParallelLayout, rank: int, *, make_vocab_size_divisible_by: int = DEFAULT_VOCAB_DIVISOR
) -> tuple[ParamBoxes, ...]:
    """Every parameter of the GPTModel on ``rank``.

    Raises:
        ValueError: the model cannot be cut by this layout; the message names the flags.
    """
    if errors := arch.check_layout(layout.tp, layout.pp):
        raise ValueError("; ".join(errors))
    coords = layout.coords(rank)
    params = []
    for rule, layer, local_layer in _stage_rules(arch, layout, coords.pp):
        hf_names = tuple(name.format(layer=layer) for name in rule.hf)
        if rule.split is Split.VOCAB:
            shape, boxes = _vocab(arch, hf_names, layout, coords.tp, make_vocab_size_divisible_by)
        else:
            shape, boxes = _CUTS[rule.split](arch, hf_names, layout.tp, coords.tp)
        names = tuple(name.format(layer=local_layer) for name in rule.megatron)
        params.append(ParamBoxes(names=names, shape=shape, boxes=tuple(boxes)))
    return tuple(params)


def owners(
    arch: Architecture, layout: ParallelLayout, *, make_vocab_size_divisible_by: int = DEFAULT_VOCAB_DIVISOR
) -> tuple[OwnedBox, ...]:
    """One sender for every region of the HF model: each HF element is in exactly one of these boxes.

    Replicas (data parallel, tensor parallel norms, the tied output table of the last stage) hold boxes
    with equal coordinates; the lowest rank that holds one sends it.  Sorted by HF tensor in the order
    of :func:`hf_shapes`, then by rank, and equal on every rank.
    """
    order = {name: number for number, name in enumerate(hf_shapes(arch))}
    seen: set[tuple[str, Index]] = set()
    owned: list[OwnedBox] = []
    for rank in range(layout.world_size):
        if layout.coords(rank).dp:
            continue
        for param in rank_boxes(arch, layout, rank, make_vocab_size_divisible_by=make_vocab_size_divisible_by):
            for box in param.boxes:
                if (box.hf_name, box.start) not in seen:
                    seen.add((box.hf_name, box.start))
                    owned.append(OwnedBox(rank=rank, names=param.names, box=box))
    return tuple(sorted(owned, key=lambda item: (order[item.box.hf_name], item.rank)))
