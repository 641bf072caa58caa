"""Which part of which Hugging Face tensor every rank of an SGLang engine holds.  Integers only.

Parameter names and shapes are those of SGLang 0.5.23's own modules, unquantised: q, k and v merged as [q|k|v] with
key/value heads repeated where there are more ranks than heads; gate and up merged; the vocabulary padded to a
multiple of 64 (of 64 x TP where TP does not divide that); experts stacked as ``w13_weight`` [E, 2I, H] (gate
above up) and ``w2_weight`` [E, H, I]; a tied head is the embedding itself.  A server without a GPU pads feed-forward
columns too.  Padding has no box.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.weights.coordinates.box import Box, ParamBoxes, ShapeAndBoxes, block, column_block
from megatron_tropd.weights.coordinates.hf_shapes import EMBED_TOKENS, LM_HEAD, hf_shape

VOCAB_PADDING = 64
CPU_FFN_PADDING = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLayout:
    """How one engine cuts the model over ``tp`` ranks (``--sglang-tp-size``).

    The experts are divided among ``ep`` groups of ranks (``--sglang-ep-size``).  Each group has ``tp / ep``
    consecutive ranks (SGLang's ``moe_tp``), which share every expert of the group.
    """

    tp: int = 1
    ep: int = 1
    cpu: bool = False
    """Whether the server runs without a GPU: feed-forward columns are then padded to a multiple of 32 x TP."""

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp // self.ep

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of a vocabulary table over all ranks, padding included."""
        padded = -(-vocab_size // VOCAB_PADDING) * VOCAB_PADDING
        if padded % self.tp == 0:
            return padded
        multiple = VOCAB_PADDING * self.tp
        return -(-vocab_size // multiple) * multiple

    def padded_ffn_size(self, size: int) -> int:
        """Return the feed-forward columns over all ranks that share them, padding included."""
        multiple = CPU_FFN_PADDING * self.tp if self.cpu else 1
        return -(-size // multiple) * multiple

    def cut_errors(self, arch: Architecture) -> list[str]:
        """Return the reasons why SGLang cannot cut the model this way; empty when it can."""
        if self.tp < 1 or self.ep < 1 or self.tp % self.ep:
            return [f"--sglang-ep-size {self.ep} does not divide --sglang-tp-size {self.tp}"]
        tp = f"--sglang-tp-size {self.tp}"
        cuts = [(tp, self.tp, arch.num_attention_heads, "attention heads")]
        if arch.num_experts:
            cuts.append((f"--sglang-ep-size {self.ep}", self.ep, arch.num_experts, "experts"))
            each = f"{tp} / --sglang-ep-size {self.ep} = {self.expert_tp}"
            cuts.append((each, self.expert_tp, self.padded_ffn_size(arch.moe_intermediate_size), "expert columns"))
        else:
            cuts.append((tp, self.tp, self.padded_ffn_size(arch.ffn_hidden_size), "feed-forward columns"))
        errors = [f"{name} does not divide the model's {size} {what}" for name, by, size, what in cuts if size % by]
        groups = arch.num_query_groups
        if groups % self.tp and self.tp % groups:
            errors.append(f"{tp} and the model's {groups} key/value heads: neither divides the other")
        elif self.cpu and groups % self.tp:
            errors.append(f"{tp} does not divide the model's {groups} key/value heads: SGLang pads heads on a CPU")
        if self.ep > 1 and not arch.num_experts:
            errors.append(f"--sglang-ep-size {self.ep}: {arch.family} has no experts")
        if arch.num_experts and arch.tie_word_embeddings:
            errors.append(f"SGLang's {arch.family} does not tie the head to the embedding (tie_word_embeddings)")
        return errors


def _qkv(arch: Architecture, engine: EngineLayout, rank: int, prefix: str, kind: str) -> ShapeAndBoxes:
    """Return shape and boxes of [q | k | v] of a rank's heads: k/v head ``rank // repeats`` where they are repeated."""
    rest = hf_shape(arch, f"{prefix}q_proj.{kind}")[1:]
    q_rows = arch.num_attention_heads // engine.tp * arch.head_dim
    kv_heads = max(1, arch.num_query_groups // engine.tp)
    repeats = max(1, engine.tp // arch.num_query_groups)
    kv_rows = kv_heads * arch.head_dim
    kv_start = rank // repeats * kv_rows
    boxes = [
        block(f"{prefix}q_proj.{kind}", rank * q_rows, (q_rows, *rest), 0),
        block(f"{prefix}k_proj.{kind}", kv_start, (kv_rows, *rest), q_rows),
        block(f"{prefix}v_proj.{kind}", kv_start, (kv_rows, *rest), q_rows + kv_rows),
    ]
    return (q_rows + 2 * kv_rows, *rest), boxes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """A rank's columns of a feed-forward layer (or expert)."""

    start: int
    real: int
    """Columns that the model has; the rest is padding."""
    columns: int

    @classmethod
    def of(cls, engine: EngineLayout, size: int, parts: int, part: int) -> _Share:
        columns = engine.padded_ffn_size(size) // parts
        start = part * columns
        return cls(start=start, real=min(max(size - start, 0), columns), columns=columns)

    def gate_up(self, prefix: str, hidden: int, *stack: int) -> list[Box]:
        """Return the boxes of the rows [gate; padding; up; padding]."""
        if not self.real:
            return []
        return [
            block(f"{prefix}{name}.weight", self.start, (self.real, hidden), number * self.columns, *stack)
            for number, name in enumerate(("gate_proj", "up_proj"))
        ]

    def down(self, prefix: str, hidden: int, *stack: int) -> list[Box]:
        """Return the box of the columns [down | padding]."""
        if not self.real:
            return []
        size, start = (hidden, self.real), (0, self.start)
        return [Box(hf_name=f"{prefix}down_proj.weight", start=start, size=size, local_start=(*stack, 0, 0))]


def _vocab(arch: Architecture, engine: EngineLayout, rank: int, hf_name: str) -> ParamBoxes:
    rows = engine.padded_vocab_size(arch.vocab_size) // engine.tp
    real = min(rows, arch.vocab_size - rank * rows)
    boxes = (block(hf_name, rank * rows, (real, arch.hidden_size), 0),) if real > 0 else ()
    return ParamBoxes(names=(hf_name,), shape=(rows, arch.hidden_size), boxes=boxes)


def _whole(arch: Architecture, hf_name: str) -> ParamBoxes:
    shape = hf_shape(arch, hf_name)
    return ParamBoxes(names=(hf_name,), shape=shape, boxes=(block(hf_name, 0, shape, 0),))


def _columns(arch: Architecture, engine: EngineLayout, rank: int, hf_name: str) -> ParamBoxes:
    box = column_block(hf_name, hf_shape(arch, hf_name), engine.tp, rank)
    return ParamBoxes(names=(hf_name,), shape=box.size, boxes=(box,))


def _attention(arch: Architecture, engine: EngineLayout, rank: int, layer: str) -> Iterator[ParamBoxes]:
    yield _whole(arch, layer + "input_layernorm.weight")
    prefix = layer + "self_attn."
    for kind in ("weight", "bias") if arch.qkv_bias else ("weight",):
        shape, boxes = _qkv(arch, engine, rank, prefix, kind)
        yield ParamBoxes(names=(f"{prefix}qkv_proj.{kind}",), shape=shape, boxes=tuple(boxes))
    if arch.qk_norm:
        yield _whole(arch, prefix + "q_norm.weight")
        yield _whole(arch, prefix + "k_norm.weight")
    yield _columns(arch, engine, rank, prefix + "o_proj.weight")
    yield _whole(arch, layer + "post_attention_layernorm.weight")


def _dense_mlp(arch: Architecture, engine: EngineLayout, rank: int, prefix: str) -> Iterator[ParamBoxes]:
    share, hidden = _Share.of(engine, arch.ffn_hidden_size, engine.tp, rank), arch.hidden_size
    gate_up, down = tuple(share.gate_up(prefix, hidden)), tuple(share.down(prefix, hidden))
    yield ParamBoxes(names=(prefix + "gate_up_proj.weight",), shape=(2 * share.columns, hidden), boxes=gate_up)
    yield ParamBoxes(names=(prefix + "down_proj.weight",), shape=(hidden, share.columns), boxes=down)


def _experts(arch: Architecture, engine: EngineLayout, rank: int, prefix: str) -> Iterator[ParamBoxes]:
    yield _whole(arch, prefix + "gate.weight")
    ep_rank, part = divmod(rank, engine.expert_tp)
    local, hidden = arch.num_experts // engine.ep, arch.hidden_size
    share = _Share.of(engine, arch.moe_intermediate_size, engine.expert_tp, part)
    w13: list[Box] = []
    w2: list[Box] = []
    for number in range(local):
        expert = f"{prefix}experts.{ep_rank * local + number}."
        w13 += share.gate_up(expert, hidden, number)
        w2 += share.down(expert, hidden, number)
    shapes = {"w13": (local, 2 * share.columns, hidden), "w2": (local, hidden, share.columns)}
    for name, boxes in (("w13", w13), ("w2", w2)):
        yield ParamBoxes(names=(f"{prefix}experts.{name}_weight",), shape=shapes[name], boxes=tuple(boxes))


def engine_boxes(arch: Architecture, engine: EngineLayout, rank: int) -> tuple[ParamBoxes, ...]:
    """Return every parameter of the model on tensor-parallel rank ``rank`` of an engine.

    Raises:
        ValueError: SGLang cannot cut the model this way (the message names the flags), or the engine has no such rank.
    """
    if errors := engine.cut_errors(arch):
        raise ValueError("; ".join(errors))
    if not 0 <= rank < engine.tp:
        raise ValueError(f"rank {rank} is not in an engine of {engine.tp} ranks")
    params = [_vocab(arch, engine, rank, EMBED_TOKENS)]
    for number in range(arch.num_layers):
        layer = f"model.layers.{number}."
        params += _attention(arch, engine, rank, layer)
        mlp = _experts if arch.num_experts else _dense_mlp
        params += mlp(arch, engine, rank, layer + "mlp.")
    params.append(_whole(arch, "model.norm.weight"))
    if not arch.tie_word_embeddings:
        params.append(_vocab(arch, engine, rank, LM_HEAD))
    return tuple(params)


def parameter_names(arch: Architecture, hf_names: Collection[str]) -> set[str]:
    """Return the names of an engine's parameters that the HF tensors ``hf_names`` fill completely.

    The names do not depend on how the engine is cut.

    Raises:
        ValueError: SGLang does not support the model.
    """
    given = set(hf_names)
    params = engine_boxes(arch, EngineLayout(), 0)
    return {param.names[0] for param in params if all(box.hf_name in given for box in param.boxes)}
