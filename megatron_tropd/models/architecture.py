"""Architecture of a model: sizes, RoPE, attention window, and the weight table of its family.

A family is a row of ``FAMILIES``.  Adding one that is built from the same blocks (RMSNorm, SwiGLU,
RoPE, grouped-query attention) means adding a row; no other module of the package depends on the family.
``hf_config.py`` reads an architecture from a ``config.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from megatron_tropd.models.weight_table import (
    ATTENTION_RULES,
    DENSE_MLP_RULES,
    EXPERT_RULES,
    QK_NORM_RULES,
    QKV_BIAS_RULE,
    ROUTER_RULES,
    WeightRule,
)
from megatron_tropd.parallel.layout import stage_sizes


class UnsupportedArchitecture(ValueError):
    """The checkpoint describes a model this package cannot build faithfully."""


class Window(Enum):
    """Which layers of a family attend to only the last ``sliding_window`` tokens, if its config gives that number."""

    NONE = "none: the family has no sliding window"
    ALL_LAYERS = "every layer"
    BY_LAYER_TYPE = "the layers whose entry of layer_types is sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What distinguishes one HF ``model_type`` from the common decoder."""

    qkv_bias: bool = False
    qk_norm: bool = False
    sparse: bool = False
    """Every layer routes its tokens to experts."""
    window: Window = Window.NONE
    allowed_flags: Mapping[str, object]
    """Config keys that change the network, with the only value this package implements."""


FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias=True, window=Window.BY_LAYER_TYPE, allowed_flags={}),
    "qwen3": Family(qk_norm=True, window=Window.BY_LAYER_TYPE, allowed_flags={"attention_bias": False}),
    "llama": Family(allowed_flags={"attention_bias": False, "mlp_bias": False}),
    "mistral": Family(window=Window.ALL_LAYERS, allowed_flags={}),
    "qwen3_moe": Family(
        qk_norm=True,
        sparse=True,
        window=Window.ALL_LAYERS,
        allowed_flags={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama-3 frequency scaling (``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN frequency scaling (``rope_type: yarn``; arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Whether the bounds of the ramp between both kinds of frequencies are rounded outwards to whole dimensions."""
    attention_factor: float
    """What rotated queries and keys are multiplied by; attention scores get its square."""


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
    rope_llama3: Llama3Scaling | None = None
    rope_yarn: YarnScaling | None = None
    attention_window: int | None = None
    """Tokens that a layer with a sliding window attends to, the token itself included; None: all layers attend to
    everything before.  The window is not implemented: a sequence may not be longer."""
    num_experts: int = 0
    """Experts of every layer; 0: a dense model.  The three below are its sizes and switches."""
    moe_intermediate_size: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = False

    @property
    def max_sequence_length(self) -> int:
        """Tokens of the longest sequence that this package computes as transformers does."""
        return min(self.max_position_embeddings, self.attention_window or self.max_position_embeddings)

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
        self, tp: int, pp: int, *, ep: int = 1, etp: int | None = None, vpp: int | None = None,
        first_layers: int | None = None, last_layers: int | None = None, owner: str = "",
    ) -> list[str]:  # fmt: skip
        """Return the reasons why the weights cannot be cut this way; empty when they can.  Sizes are those of
        :class:`ParallelLayout`."""

        def flag(axis: str, size: int | None) -> str:
            return f"--{owner}{axis}-parallel-size {size}"

        tensor, expert_tp = flag("tensor-model", tp), tp if etp is None else etp
        cuts = [(tensor, tp, self.num_attention_heads, "attention heads")]
        if self.num_experts:
            cuts.append((flag("expert-tensor", expert_tp), expert_tp, self.moe_intermediate_size, "expert columns"))
            cuts.append((flag("expert-model", ep), ep, self.num_experts, "experts"))
        else:
            cuts.append((tensor, tp, self.ffn_hidden_size, "feed-forward columns"))
        errors = [f"{name} does not divide the model's {size} {what}" for name, by, size, what in cuts if size % by]
        try:
            stage_sizes(self.num_layers, pp, vpp=vpp, first=first_layers, last=last_layers, owner=owner)
        except ValueError as error:
            errors.append(str(error))
        groups = self.num_query_groups
        if groups % tp and tp % groups:
            errors.append(f"{tensor} and the model's {groups} key/value heads: neither divides the other")
        elif not self.num_attention_heads % tp and (rows := 2 * groups * self.head_dim) % tp:
            errors.append(f"{tensor} does not divide the {rows} rows of the model's key/value heads")
        if not self.num_experts and (ep > 1 or etp not in (None, 1, tp)):
            errors.append(f"{flag('expert-model', ep)} and {flag('expert-tensor', etp)}: {self.family} has no experts")
        return errors

    def check_layout(
        self, tp: int, pp: int, *, ep: int = 1, etp: int | None = None, vpp: int | None = None,
        first_layers: int | None = None, last_layers: int | None = None, owner: str = "",
    ) -> list[str]:  # fmt: skip
        """Return the reasons why the model cannot be built and run this way; empty when it can.

        Stricter than :meth:`cut_errors` by one rule: Megatron gathers shared key/value heads over its global
        tensor-parallel group, which is the wrong one for a teacher with a layout of its own.
        """
        errors = self.cut_errors(
            tp, pp, ep=ep, etp=etp, vpp=vpp, first_layers=first_layers, last_layers=last_layers, owner=owner
        )
        if tp > (groups := self.num_query_groups) and not tp % groups:
            errors.append(
                f"--{owner}tensor-model-parallel-size {tp} does not divide the model's {groups} key/value heads"
            )
        return errors
