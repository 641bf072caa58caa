"""Builds a GPTModel from an architecture and a layout, and runs it on packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.attention import ATTENTION_DTYPES, PackedAttention
from megatron_tropd.models.rope import inverse_frequencies
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import Microbatch


class HiddenStateGPT(GPTModel):
    """A GPTModel whose last stage returns hidden states: only ``ops/`` makes logits, one chunk of tokens at a time."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As Megatron's, with the rotary angles of every token, not of every position (:func:`packed_seq_params`)."""
        decoder_input, angles, *rest = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if not self.config.apply_rope_fusion:
            angles = angles[position_ids[0]]  # [T, 1, 1, head_dim]
        return (decoder_input, angles, *rest)

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """[T, 1, H] ([T / tp, 1, H] under sequence parallelism)."""
        return hidden_states

    def lm_head_weight(self) -> Tensor:
        """This rank's rows of the output table [V_padded / tp, H]; the embedding's where tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def transformer_config(
    arch: Architecture, layout: ParallelLayout, params_dtype: torch.dtype, overrides: Mapping[str, Any]
) -> TransformerConfig:
    """Return Megatron's config for ``arch``, cut by ``layout``."""
    cuda, te = platform.is_cuda(), platform.has_transformer_engine()
    te_attention = te and params_dtype in ATTENTION_DTYPES
    values: dict[str, Any] = {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "softmax_scale": _softmax_scale(arch),
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "virtual_pipeline_model_parallel_size": layout.vpp,
        "num_layers_in_first_pipeline_stage": layout.first_layers,
        # Of two stages the second holds the rest; given both numbers, Megatron divides by the stages between: none.
        "num_layers_in_last_pipeline_stage": None if layout.first_layers and layout.pp == 2 else layout.last_layers,
        "params_dtype": params_dtype,
        "pipeline_dtype": params_dtype,
        "bf16": params_dtype == torch.bfloat16,
        "fp16": params_dtype == torch.float16,
        # Weights always come from a checkpoint.  The flags below name what needs TE, apex or CUDA.
        "perform_initialization": True,
        "use_cpu_initialization": not cuda,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": cuda,
        "bias_dropout_fusion": cuda,
        "apply_rope_fusion": te_attention,
        "persist_layer_norm": False,
    }
    if arch.num_experts:
        values.update(_experts(arch, layout, te))
    return TransformerConfig(**{**values, **overrides})


def _softmax_scale(arch: Architecture) -> float | None:
    """Scale of attention scores; None for Megatron's own.

    YaRN multiplies rotated queries and keys by a factor.  The scores get its square, which is the same and which every
    attention kernel applies; Transformer Engine's fused RoPE would leave the factor out.
    """
    return arch.rope_yarn.attention_factor**2 / arch.head_dim**0.5 if arch.rope_yarn else None


def _experts(arch: Architecture, layout: ParallelLayout, te: bool) -> dict[str, Any]:
    """Config of the router and its experts.

    No auxiliary loss: the student is to have the teacher's distribution, not a balanced load.
    """
    return {
        "num_moe_experts": arch.num_experts,
        "moe_ffn_hidden_size": arch.moe_intermediate_size,
        "moe_router_topk": arch.num_experts_per_tok,
        # A softmax over the chosen logits is the softmax over all, renormalised over the chosen.
        "moe_router_pre_softmax": not arch.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": te,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def _layer_spec(config: TransformerConfig) -> Any:
    """Transformer Engine's layers where it is installed, else Megatron's own; packed attention where TE has none."""
    choices = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if platform.has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm, **choices)
        if not config.apply_rope_fusion:
            spec.submodules.self_attention.submodules.core_attention = PackedAttention
        return spec
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization, **choices)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    if config.num_moe_experts:
        # The spec stores this norm under the name that TE's fused layer has; TE fuses none into a router.
        keys = spec.submodules.sharded_state_dict_keys_map
        spec.submodules.sharded_state_dict_keys_map = {k: v for k, v in keys.items() if k != "pre_mlp_layernorm."}
    return spec


def build_gpt_model(
    arch: Architecture,
    groups: ModelGroups,
    *,
    params_dtype: torch.dtype = torch.float32,
    config_overrides: Mapping[str, Any] | None = None,
    chunk: int = 0,
) -> HiddenStateGPT:
    """This rank's part of the model, on this rank's device, with arbitrary weights.  With virtual pipeline stages it is
    one chunk of that part (:func:`megatron_tropd.models.chunks.build_chunks` makes all).

    ``config_overrides`` are TransformerConfig fields (``sequence_parallel``, ``recompute_granularity``).

    Raises:
        ValueError: the layout does not divide the architecture; the message names the flag.
    """
    layout = groups.layout
    if errors := arch.check_layout(**layout.cut):
        raise ValueError("; ".join(errors))
    config = transformer_config(arch, layout, params_dtype, config_overrides or {})
    model = HiddenStateGPT(
        config=config,
        transformer_layer_spec=_layer_spec(config),
        vp_stage=chunk if layout.vpp else None,
        vocab_size=layout.padded_vocab_size(arch.vocab_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=groups.is_first_stage and chunk == 0,
        post_process=groups.is_last_stage and chunk == layout.chunks - 1,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=arch.rope_theta,  # type: ignore[arg-type]  # Megatron annotates int and divides
        pg_collection=groups.pg_collection,
    )
    rope = model.rotary_pos_emb
    rope.inv_freq = inverse_frequencies(rope.inv_freq, arch)
    rope.cp_group = None  # every position has its angles: those of a rank's own tokens are taken by their positions
    # The local spec makes fp32 norms whatever params_dtype says; TE's follow it.  One dtype for all.
    return model.to(device=platform.device(), dtype=params_dtype)


def packed_seq_params(batch: Microbatch, config: TransformerConfig) -> PackedSeqParams:
    """Return the sequence boundaries as Megatron's PackedSeqParams.

    Transformer Engine's kernels, RoPE's and attention's, take packed sequences as ``thd``.  Megatron's own RoPE for
    ``thd`` waits for the device in every layer, and cuts and joins the sequences; so without those kernels the format
    is that of one long sequence, for which RoPE is one pass over given angles, and only :class:`PackedAttention` looks
    at the boundaries.

    Under context parallelism the boundaries are those of the whole micro-batch, and the kernels divide them.  The
    padding of a sequence counts as a part of it, since kernels with room between sequences are fewer.
    """
    padded = batch.cu_seqlens if config.context_parallel_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd" if config.apply_rope_fusion else "sbhd",
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_kv=batch.cu_seqlens,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_kv=batch.max_seqlen,
    )


def forward_hidden(model: Any, batch: Microbatch) -> Tensor:
    """Run this stage over one packed micro-batch; ``model`` may be wrapped in Float16Module or DDP."""
    return model(
        input_ids=batch.token_T[None],
        position_ids=batch.position_T[None],
        attention_mask=None,
        packed_seq_params=packed_seq_params(batch, model.config),
    )
