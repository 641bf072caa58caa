"""Architecture of a model, read from its HF config: sizes, RoPE, and one weight table per family.

A family is a row of ``FAMILIES``.  Adding one that is built from the same blocks (RMSNorm, SwiGLU,
RoPE, grouped-query attention) means adding a row; no other module of the package depends on the family.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What distinguishes one HF ``model_type`` from the common decoder."""

    qkv_bias: bool = False
    qk_norm: bool = False
    sparse: bool = False
    """Every layer routes its tokens to experts."""
    allowed_flags: Mapping[str, object]
    """Config keys that change the network, with the only value this package implements."""


FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias=True, allowed_flags={"use_sliding_window": False}),
    "qwen3": Family(qk_norm=True, allowed_flags={"use_sliding_window": False, "attention_bias": False}),
    "llama": Family(allowed_flags={"attention_bias": False, "mlp_bias": False}),
    "qwen3_moe": Family(
        qk_norm=True,
        sparse=True,
        allowed_flags={
            "use_sliding_window": False,
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
    ),
}


class UnsupportedArchitecture(ValueError):
    """The checkpoint describes a model this package cannot build faithfully."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Sizes and switches of one decoder, as its HF ``config.json`` gives them."""

    family: str
    vocab_size: int
    hidden_size: int
    ffn_hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    norm_epsilon: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    rope_linear_factor: float | None = None
    rope_llama3: RopeScaling | None = None
    num_experts: int = 0
    """Experts of every layer; 0: a dense model.  The three below are its sizes and switches."""
    moe_intermediate_size: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have a bias."""
        return FAMILIES[self.family].qkv_bias

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised per head."""
        return FAMILIES[self.family].qk_norm

    def layer_rules(self) -> tuple[WeightRule, ...]:
        """Weight table of one decoder layer, without its experts."""
        mlp = ROUTER_RULES if self.num_experts else DENSE_MLP_RULES
        bias = (QKV_BIAS_RULE,) if self.qkv_bias else ()
        return ATTENTION_RULES + mlp + bias + (QK_NORM_RULES if self.qk_norm else ())

    def expert_rules(self) -> tuple[WeightRule, ...]:
        """Weight table of one expert of a layer; empty for a dense model."""
        return EXPERT_RULES if self.num_experts else ()

    def cut_errors(
        self, tp: int, pp: int, *, ep: int = 1, etp: int | None = None, vpp: int | None = None, owner: str = ""
    ) -> list[str]:
        """Return the reasons why the weights cannot be cut this way; empty when they can.  ``etp`` None is ``tp``."""

        def flag(axis: str, size: int | None) -> str:
            return f"--{owner}{axis}-parallel-size {size}"

        tensor, expert_tp = flag("tensor-model", tp), tp if etp is None else etp
        cuts = [(tensor, tp, self.num_attention_heads, "attention heads")]
        if self.num_experts:
            cuts.append((flag("expert-tensor", expert_tp), expert_tp, self.moe_intermediate_size, "expert columns"))
            cuts.append((flag("expert-model", ep), ep, self.num_experts, "experts"))
        else:
            cuts.append((tensor, tp, self.ffn_hidden_size, "feed-forward columns"))
        cuts.append((flag("pipeline-model", pp), pp, self.num_layers, "layers"))
        errors = [f"{name} does not divide the model's {size} {what}" for name, by, size, what in cuts if size % by]
        groups = self.num_query_groups
        if groups % tp and tp % groups:
            errors.append(f"{tensor} and the model's {groups} key/value heads: neither divides the other")
        elif not self.num_attention_heads % tp and (rows := 2 * groups * self.head_dim) % tp:
            errors.append(f"{tensor} does not divide the {rows} rows of the model's key/value heads")
        if vpp and not self.num_layers % pp and (layers := self.num_layers // pp) % vpp:
            virtual = f"--{owner}num-virtual-stages-per-pipeline-rank {vpp}"
            errors.append(f"{virtual} does not divide the {layers} layers of a pipeline stage")
        if not self.num_experts and (ep > 1 or etp not in (None, 1, tp)):
            errors.append(f"{flag('expert-model', ep)} and {flag('expert-tensor', etp)}: {self.family} has no experts")
        return errors

    def check_layout(
        self, tp: int, pp: int, *, ep: int = 1, etp: int | None = None, vpp: int | None = None, owner: str = ""
    ) -> list[str]:
        """Return the reasons why the model cannot be built and run this way; empty when it can.

        Stricter than :meth:`cut_errors` by one rule: Megatron gathers shared key/value heads over its global
        tensor-parallel group, which is the wrong one for a teacher with a layout of its own.
        """
        errors = self.cut_errors(tp, pp, ep=ep, etp=etp, vpp=vpp, owner=owner)
        if tp > (groups := self.num_query_groups) and not tp % groups:
            errors.append(
                f"--{owner}tensor-model-parallel-size {tp} does not divide the model's {groups} key/value heads"
            )
        return errors


def _rope(config: Mapping[str, Any]) -> tuple[float, float | None, RopeScaling | None]:
    """(theta, linear factor, llama3 scaling) from either dialect: transformers 4 keeps ``rope_theta``
    beside ``rope_scaling``, transformers 5 keeps everything in ``rope_parameters``."""
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedArchitecture("partial_rotary_factor other than 1.0 is not supported")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None, None
    if kind == "linear":
        return theta, float(scaling["factor"]), None
    if kind == "llama3":
        return (
            theta,
            None,
            RopeScaling(
                factor=float(scaling["factor"]),
                low_freq_factor=float(scaling["low_freq_factor"]),
                high_freq_factor=float(scaling["high_freq_factor"]),
                original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
            ),
        )
    raise UnsupportedArchitecture(f"RoPE scaling {kind!r} is not supported; known are default, linear, llama3")


def _experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a sparse model.  transformers 5 writes ``num_local_experts`` where the published files have
    ``num_experts``."""
    return {
        "num_experts": int(config.get("num_experts") or config["num_local_experts"]),
        "moe_intermediate_size": int(config["moe_intermediate_size"]),
        "num_experts_per_tok": int(config["num_experts_per_tok"]),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


def architecture_from_hf_config(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture that an HF config mapping describes.

    Raises:
        UnsupportedArchitecture: unknown ``model_type``, or a switch that would change the network.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UnsupportedArchitecture(
            f"config.json has model_type {family!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    wanted = {"hidden_act": "silu", **FAMILIES[family].allowed_flags}
    for name, value in wanted.items():
        if (config.get(name) if config.get(name) is not None else value) != value:
            raise UnsupportedArchitecture(f"{family} with {name}={config[name]!r} is not supported (only {value!r})")
    theta, linear, llama3 = _rope(config)
    experts = _experts(config) if FAMILIES[family].sparse else {}
    heads = int(config["num_attention_heads"])
    hidden = int(config["hidden_size"])
    return Architecture(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden,
        ffn_hidden_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_attention_heads=heads,
        num_query_groups=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        norm_epsilon=float(config["rms_norm_eps"]),
        max_position_embeddings=int(config["max_position_embeddings"]),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_linear_factor=linear,
        rope_llama3=llama3,
        **experts,
    )


def architecture_from_dict(value: Mapping[str, Any]) -> Architecture:
    """Return the architecture in a mapping made by ``dataclasses.asdict``, as files and messages hold it.

    Raises:
        KeyError, TypeError: a field is missing or unknown.
    """
    llama3 = value["rope_llama3"]
    return Architecture(**{**value, "rope_llama3": RopeScaling(**llama3) if llama3 else None})


def load_hf_config(directory: str | Path) -> dict[str, Any]:
    """Read the ``config.json`` of an HF checkpoint directory.

    Raises:
        FileNotFoundError, ValueError: with the path, when it is missing or not JSON.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; an HF checkpoint directory needs a config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
