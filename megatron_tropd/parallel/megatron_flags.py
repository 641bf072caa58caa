"""Megatron-core's own settings by their own names: the scalar fields of its three config dataclasses, as flags.

``TransformerConfig.overlap_p2p_comm`` is ``--overlap-p2p-comm``.  The fields are those of the installed Megatron-core.
Megatron is imported when the first name is looked up, so a command line without such flags does not wait for it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from megatron_tropd.parallel import platform

Home = Literal["model", "ddp", "optimizer"]
"""TransformerConfig, DistributedDataParallelConfig or OptimizerConfig."""

_ELSEWHERE = {
    "virtual_pipeline_model_parallel_size": "give --num-virtual-stages-per-pipeline-rank",
    "num_layers_in_first_pipeline_stage": "give --decoder-first-pipeline-num-layers",
    "num_layers_in_last_pipeline_stage": "give --decoder-last-pipeline-num-layers",
    **dict.fromkeys(
        ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
         "pipeline_model_parallel_layout"),
        "give --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers",
    ),
    "fp16": "give --bf16, or train in fp32; fp16 would need a loss scale",
    **dict.fromkeys(("enable_autocast", "autocast_dtype"), "give --bf16, or train in fp32"),
    "grad_reduce_in_fp32": "it is always on: the vocabulary head adds its gradient in fp32",
    "calculate_per_token_loss": "it is always on: the loss is a mean over all tokens of an update",
    "average_in_collective": "gradients are divided once, by the tokens of an update",
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), "it is 0: an engine without dropout writes the rollouts"),
    **dict.fromkeys(("perform_initialization", "use_cpu_initialization", "init_model_with_meta_device"),
                    "weights come from a checkpoint"),
    "optimizer": "it is adam",
    "overlap_param_gather_with_optimizer_step": "checkpoints hold one optimizer of all model chunks",
    **dict.fromkeys(("decoupled_lr", "decoupled_min_lr"), "all parameters have the rate of --lr"),
    **dict.fromkeys(("use_megatron_fsdp", "use_custom_fsdp", "data_parallel_sharding_strategy",
                     "outer_dp_sharding_strategy"), "this package trains with Megatron's DistributedDataParallel"),
    "num_distributed_optimizer_instances": "this package makes one set of data-parallel groups",
    **dict.fromkeys(("overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "ep_overlap_early_attn_memory_release"),
                    "it needs a forward pass in pieces, which this package does not make"),
    **dict.fromkeys(("enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl", "cuda_graph_scope"),
                    "the length of micro-batches differs from step to step"),
    "mtp_num_layers": "this package trains no multi-token prediction",
    "transformer_impl": "Transformer Engine's layers are used where they are installed",
    **dict.fromkeys(("cp_comm_type", "hierarchical_context_parallel_sizes", "hybrid_context_parallel",
                     "max_seqlen_per_dp_cp_rank"),
                    "context-parallel ranks hand keys and values on in a ring, over one --context-parallel-size"),
}  # fmt: skip
"""Fields that this package sets or does not support -> what to do instead."""

_ARCHITECTURE = frozenset({
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit", "glu_linear_offset",
    "activation_func_clamp_value", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "qk_l2_norm", "qk_clip",
    "softmax_scale", "softmax_type", "rotary_interleaved", "window_size", "window_attn_skip_freq", "no_rope_freq",
    "multi_latent_attention", "attention_output_gate", "apply_residual_connection_post_layernorm",
    "apply_query_key_layer_scaling", "experimental_attention_variant", "linear_attention_freq", "num_moe_experts",
    "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_router_score_function",
    "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk",
    "moe_router_topk_limited_devices", "moe_router_enable_expert_bias", "moe_router_force_load_balancing",
    "moe_layer_freq", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_latent_size",
    "moe_apply_probs_on_input", "moe_input_jitter_eps", "moe_expert_capacity_factor", "moe_token_dropping",
    "heterogeneous_block_specs", "is_hybrid_model",
})  # fmt: skip
"""Fields that say what the network computes; config.json of the model does."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MegatronField:
    """A field that can be a flag, of one or several of Megatron's dataclasses."""

    name: str
    kind: Any
    """bool, int, float, str or a Literal."""
    homes: tuple[Home, ...]
    enum_type: type[enum.Enum] | None = None
    """Type of the value where ``kind`` is a Literal of the names of its members."""


def _kind(hint: Any) -> Any:
    """Return the type of a flag for a field of this type; None where it is not scalar.  Of a union, the first."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((kind for part in typing.get_args(hint) if (kind := _kind(part))), None)
    if typing.get_origin(hint) is Literal:
        return hint if all(isinstance(word, str) for word in typing.get_args(hint)) else None
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return Literal[tuple(hint.__members__)]  # type: ignore[return-value]
    return hint if hint in (bool, int, float, str) else None


@functools.cache
def _classes() -> dict[Home, type]:
    platform.install()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    return {"model": TransformerConfig, "ddp": DistributedDataParallelConfig, "optimizer": OptimizerConfig}


@functools.cache
def megatron_fields() -> dict[str, MegatronField]:
    """Return every scalar field by its flag, without dashes in front."""
    found: dict[str, MegatronField] = {}
    for home, cls in _classes().items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            if f.name.startswith("_") or (kind := _kind(hints[f.name])) is None:
                continue
            flag, hint = f.name.replace("_", "-"), hints[f.name]
            before = found[flag].homes if flag in found else ()
            found[flag] = MegatronField(
                name=f.name, kind=kind, homes=(*before, home),
                enum_type=hint if isinstance(hint, type) and issubclass(hint, enum.Enum) else None,
            )  # fmt: skip
    return found


def find_field(flag: str) -> MegatronField | None:
    """Return the field that ``--flag`` sets, or ``--no-...`` switches off; None if Megatron has none."""
    fields = megatron_fields()
    negated = fields.get(flag.removeprefix("no-"))
    return fields.get(flag) or (negated if negated and negated.kind is bool else None)


def refusal(name: str) -> str | None:
    """Return why the field ``name`` cannot be given, and what to do instead; None if it can."""
    if name in _ARCHITECTURE:
        return "it says what the network computes, and is read from the config.json of --hf-checkpoint"
    if name.startswith(("fp8", "fp4")) or "mxfp8" in name:
        return "this package trains in bf16 or fp32"
    return _ELSEWHERE.get(name)


def values_of(flags: Mapping[str, Any], home: Home) -> dict[str, Any]:
    """Return what the ``flags`` (by name, without dashes) set in one of Megatron's dataclasses, by field."""
    if not flags:
        return {}
    fields = megatron_fields()
    return {
        field.name: field.enum_type[value] if field.enum_type else value
        for flag, value in flags.items()
        if home in (field := fields[flag]).homes
    }
