"""The weight tables: which Hugging Face tensors fill which Megatron parameter, and how tensor parallelism cuts it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

DECODER_LAYER = "decoder.layers.{layer}."
HF_LAYER = "model.layers.{layer}."


class Split(Enum):
    """How a Megatron parameter is cut over tensor-parallel ranks, in terms of its HF tensors."""

    REPLICATED = "every rank holds the whole tensor"
    VOCAB = "rows of the padded vocabulary"
    COLUMNS = "dimension 1 (an expert's: over its expert-tensor-parallel ranks)"
    QKV = "rows of q, k and v interleaved by query group: [q_0..q_r-1, k, v] for each group"
    GATE_UP = "[gate_r; up_r]: each rank's rows of gate, then its rows of up (an expert's: as COLUMNS)"


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRule:
    """One Megatron parameter and the HF tensors that fill it."""

    megatron: tuple[str, ...]
    """Name in a GPTModel; the first is the Transformer Engine spec's, then the local spec's alias.  An expert's
    has ``{expert}``, its number on this rank; in ``hf`` that is its number in the whole model."""
    hf: tuple[str, ...]
    split: Split


def _layer(megatron: str | tuple[str, ...], hf: str | tuple[str, ...], split: Split) -> WeightRule:
    names = (megatron,) if isinstance(megatron, str) else megatron
    sources = (hf,) if isinstance(hf, str) else hf
    return WeightRule(
        megatron=tuple(DECODER_LAYER + name for name in names),
        hf=tuple(HF_LAYER + name for name in sources),
        split=split,
    )


_QKV = tuple(f"self_attn.{x}_proj." for x in "qkv")

ATTENTION_RULES = (
    _layer(
        ("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"),
        "input_layernorm.weight",
        Split.REPLICATED,
    ),
    _layer("self_attention.linear_qkv.weight", tuple(n + "weight" for n in _QKV), Split.QKV),
    _layer("self_attention.linear_proj.weight", "self_attn.o_proj.weight", Split.COLUMNS),
)
DENSE_MLP_RULES = (
    _layer(
        ("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"),
        "post_attention_layernorm.weight",
        Split.REPLICATED,
    ),
    _layer("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), Split.GATE_UP),
    _layer("mlp.linear_fc2.weight", "mlp.down_proj.weight", Split.COLUMNS),
)
# Before a router the norm is a module of its own in both specs.
ROUTER_RULES = (
    _layer("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", Split.REPLICATED),
    _layer("mlp.router.weight", "mlp.gate.weight", Split.REPLICATED),
)


def _expert(part: str, hf: tuple[str, ...], split: Split) -> WeightRule:
    """Names of the grouped experts of Transformer Engine, then of Megatron's SequentialMLP."""
    return _layer(
        (f"mlp.experts.{part}.weight{{expert}}", f"mlp.experts.local_experts.{{expert}}.{part}.weight"),
        tuple(f"mlp.experts.{{expert}}.{name}.weight" for name in hf),
        split,
    )


EXPERT_RULES = (
    _expert("linear_fc1", ("gate_proj", "up_proj"), Split.GATE_UP),
    _expert("linear_fc2", ("down_proj",), Split.COLUMNS),
)
QKV_BIAS_RULE = _layer("self_attention.linear_qkv.bias", tuple(n + "bias" for n in _QKV), Split.QKV)
QK_NORM_RULES = tuple(
    _layer(f"self_attention.{x}_layernorm.weight", f"self_attn.{x}_norm.weight", Split.REPLICATED) for x in "qk"
)
EMBEDDING_RULE = WeightRule(
    megatron=("embedding.word_embeddings.weight",), hf=("model.embed_tokens.weight",), split=Split.VOCAB
)
FINAL_NORM_RULE = WeightRule(
    megatron=("decoder.final_layernorm.weight",), hf=("model.norm.weight",), split=Split.REPLICATED
)
OUTPUT_RULE = WeightRule(megatron=("output_layer.weight",), hf=("lm_head.weight",), split=Split.VOCAB)
TIED_OUTPUT_RULE = WeightRule(megatron=("output_layer.weight",), hf=("model.embed_tokens.weight",), split=Split.VOCAB)
