"""The ways in which the product attends to packed sequences without Transformer Engine, and with which numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_tropd.models.attention import attention_kind, padded_attention, varlen_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [T, heads, head_dim], key and value [T, groups, head_dim]) -> [T, heads, head_dim]."""
KINDS = ("varlen", "padded")


def unavailable(kind: str, dtype: torch.dtype, head_dim: int) -> str:
    """Return why ``kind`` cannot run on this device; empty if it can."""
    chosen, why = attention_kind(dtype, head_dim)
    return why if kind == "varlen" and chosen != "varlen" else ""


def attention(kind: str, sequences: PackedSeqParams) -> Attention:
    """Return the product's attention of one kind, over given sequences."""
    attend = {"varlen": varlen_attention, "padded": padded_attention}[kind]
    return lambda query, key, value: attend(query, key, value, sequences, None)
