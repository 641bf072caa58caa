"""Core attention over packed sequences without Transformer Engine.

Megatron's own DotProductAttention cannot read the packed (THD) format.  This one can, on any device,
through torch's scaled_dot_product_attention; where Transformer Engine is installed its kernel is
used instead (``build.py``).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


def pad_index(cu_seqlens: Tensor, max_seqlen: int) -> tuple[Tensor, Tensor]:
    """Index maps between packed tokens and a [num_sequences, max_seqlen] table, in both directions.

    Returns ``table`` [B, S] (packed index of each cell; 0 in cells without a token) and ``flat`` [T]
    (cell number of each packed token).
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    column = torch.arange(max_seqlen, device=cu_seqlens.device)
    filled = column[None, :] < lengths[:, None]
    table = torch.where(filled, cu_seqlens[:-1].long()[:, None] + column[None, :], 0)
    return table, filled.flatten().nonzero().squeeze(1)


class PackedSdpaAttention(MegatronModule):
    """Causal grouped-query attention; a token sees only its own sequence.

    Sequences are laid out as rows of a right-padded table: under a causal mask a token attends
    to nothing on its right, so the padding needs no mask of its own.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("--context-parallel-size above 1 needs Transformer Engine")
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """[T, heads, head_dim] in, [T, heads * head_dim] out (packed); [s, b, ...] without packing."""
        if packed_seq_params is None:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return self._attend(query, key, value).permute(2, 0, 1, 3).flatten(2)
        table, flat = pad_index(packed_seq_params.cu_seqlens_q, packed_seq_params.max_seqlen_q)
        query, key, value = (x[table].transpose(1, 2) for x in (query, key, value))  # [B, heads, S, head_dim]
        context = self._attend(query, key, value).transpose(1, 2)
        return context.flatten(0, 1)[flat].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
