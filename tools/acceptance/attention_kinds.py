"""The ways in which the product attends to packed sequences: the only place that knows how they are called."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.attention import PackedSdpaAttention
from megatron_tropd.models.build import transformer_config
from megatron_tropd.parallel.groups import ModelGroups

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [T, heads, head_dim], key and value [T, groups, head_dim]) -> [T, heads * head_dim]."""
KINDS = ("padded",)


def unavailable(kind: str, dtype: torch.dtype) -> str:
    """Return why ``kind`` cannot run on this device; empty if it can."""
    return ""


def attention(
    kind: str, arch: Architecture, groups: ModelGroups, dtype: torch.dtype, sequences: PackedSeqParams
) -> Attention:  # fmt: skip
    """Return the product's attention of one kind, over given sequences."""
    assert kind == "padded", "the only kind today"
    module = PackedSdpaAttention(transformer_config(arch, groups, dtype, {}), 1, None, "self")
    return lambda query, key, value: module(query, key, value, packed_seq_params=sequences)
