"""Core attention over packed sequences without Transformer Engine.

Megatron's own DotProductAttention cannot read packed sequences.  This one can, in one of two ways: with the
variable-length flash attention of torch 2.10, which needs a GPU and 16-bit numbers, or, anywhere, on a padded table of
the sequences, whose cost grows with the longest sequence.  Transformer Engine's kernel is used instead where it is
installed and the numbers have 16 bits (``build.py``).

Context parallelism needs Transformer Engine on a GPU.  Without one the padded table has it too, so that all around the
kernel is tested: every rank gathers the keys and values of whole sequences, which takes as much memory as without.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.context import held_tokens, packed_order

AttentionKind = Literal["varlen", "padded"]
ATTENTION_DTYPES = (torch.bfloat16, torch.float16)
"""Of flash attention, and of Transformer Engine's attention over packed sequences."""
_MAX_HEAD_DIM, _HEAD_DIM_STEP = 256, 8
"""Of flash attention."""


def attention_kind(dtype: torch.dtype, head_dim: int) -> tuple[AttentionKind, str]:
    """Return how :class:`PackedAttention` attends in this process, and, for ``padded``, why not otherwise."""
    if not platform.is_cuda():
        return "padded", "there is no GPU"
    if _varlen() is None:
        return "padded", f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 has)"
    if dtype not in ATTENTION_DTYPES:
        return "padded", f"flash attention takes 16-bit numbers, not {dtype}: give --bf16"
    if head_dim > _MAX_HEAD_DIM or head_dim % _HEAD_DIM_STEP:
        return "padded", (
            f"flash attention takes heads of up to {_MAX_HEAD_DIM} in steps of {_HEAD_DIM_STEP}, not {head_dim}"
        )
    if torch.cuda.get_device_capability() < (8, 0):
        return "padded", f"flash attention needs an Ampere GPU or newer, not {torch.cuda.get_device_name()}"
    return "varlen", ""


@functools.cache
def _varlen() -> Callable[..., Any] | None:
    try:
        return importlib.import_module("torch.nn.attention.varlen").varlen_attn  # type: ignore[no-any-return]
    except (ImportError, AttributeError):
        return None


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, sequences: Any, scale: float | None) -> Tensor:
    """Flash attention; arguments as in :func:`padded_attention`, in bf16 or fp16 on a GPU.

    ``window_size``, ``scale`` and ``enable_gqa`` came to torch with different versions; without them the same is said
    in other ways.
    """
    attend = _varlen()
    assert attend is not None, "attention_kind() chose it"
    known = inspect.signature(attend).parameters
    words: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        words["enable_gqa"] = query.size(1) != key.size(1)
    else:
        key, value = _for_every_query_head(query, key, value)
    if "scale" in known:
        words["scale"] = scale
    elif scale is not None:
        query = query * (scale * query.size(2) ** 0.5)
    bounds, longest = sequences.cu_seqlens_q, sequences.max_seqlen_q
    return attend(query, key, value, bounds, bounds, longest, longest, **words)  # type: ignore[no-any-return]


def _for_every_query_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``key`` and ``value`` with as many heads (axis 1) as ``query``."""
    times = query.size(1) // key.size(1)
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def table_index(bounds: Tensor, num_tokens: int, longest: int) -> tuple[Tensor, Tensor]:
    """Index maps between packed tokens and a table [num_sequences, longest], in both directions, without a wait for
    the device.

    Returns ``table`` [B, S] (packed index of each cell; some token's in cells without one) and ``flat`` [T] (cell
    number of each packed token).
    """
    starts = bounds[:-1].long()
    token = torch.arange(num_tokens, device=bounds.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
    flat = sequence * longest + token - starts[sequence]
    cells = starts[:, None] + torch.arange(longest, device=bounds.device)
    return cells.clamp(max=num_tokens - 1), flat


def padded_attention(query: Tensor, key: Tensor, value: Tensor, sequences: Any, scale: float | None) -> Tensor:
    """Causal attention inside each sequence, on a right-padded table of the sequences.

    Under a causal mask a token attends to nothing on its right, so the padding needs no mask of its own.

    Args:
        query: [T, heads, head_dim]; ``key`` and ``value`` may have fewer heads, which divide the query's.
        key: see ``query``.
        value: see ``query``.
        sequences: Megatron's PackedSeqParams.
        scale: of the scores; None for 1 / sqrt(head_dim).

    Returns:
        [T, heads, head_dim].
    """
    table, flat = table_index(sequences.cu_seqlens_q, len(query), sequences.max_seqlen_q)
    query, key, value = (x[table].transpose(1, 2) for x in (query, key, value))  # [B, heads, S, head_dim]
    context = _attend(query, key, value, scale).transpose(1, 2)
    return context.flatten(0, 1)[flat]


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Any, scale: float | None, group: Any
) -> Tensor:
    """:func:`padded_attention` of one rank of a context ``group``; the tensors are of its T / cp tokens.

    Keys and values are gathered from all ranks; backward adds up their gradients where they came from.
    """
    cp, bounds, longest = group.size(), sequences.cu_seqlens_q, sequences.max_seqlen_q
    num_tokens = len(query) * cp
    order = packed_order(bounds, num_tokens, cp=cp)
    keys, _ = table_index(bounds, num_tokens, longest)
    queries, flat = table_index(bounds // cp, len(query), longest // cp)
    held = held_tokens(bounds, num_tokens, cp=cp, rank=group.rank())
    position = held[queries] - bounds[:-1, None]  # [B, S / cp], inside the sequence
    mask = torch.arange(longest, device=bounds.device) <= position[..., None]
    key, value = (
        gather_from_sequence_parallel_region(x.contiguous(), group=group)[order][keys].transpose(1, 2)
        for x in (key, value)
    )
    context = _attend(query[queries].transpose(1, 2), key, value, scale, mask[:, None]).transpose(1, 2)
    return context.flatten(0, 1)[flat]


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None = None) -> Tensor:
    """``mask`` is true where a query sees a key; None for a causal one."""
    grouped = query.size(1) != key.size(1)
    if grouped and query.is_cuda and query.dtype not in ATTENTION_DTYPES:
        # torch's fp32 kernel that keeps no [S, S] scores takes no groups, and the one that does keeps them.
        key, value = _for_every_query_head(query, key, value)
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


class PackedAttention(MegatronModule):
    """Causal grouped-query attention; a token sees only its own sequence."""

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
        self.softmax_scale = softmax_scale
        kind, _ = attention_kind(config.params_dtype, config.kv_channels)
        self._packed: Callable[..., Tensor] = varlen_attention if kind == "varlen" else padded_attention
        if config.context_parallel_size > 1:
            if platform.is_cuda():
                raise ValueError("--context-parallel-size above 1 needs Transformer Engine")
            self._packed = functools.partial(context_attention, group=pg_collection.cp)

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
        """[T, 1, heads, head_dim] in, [T, 1, heads * head_dim] out (packed); [s, b, ...] without packing."""
        if packed_seq_params is None:
            query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return _attend(query, key, value, self.softmax_scale).permute(2, 0, 1, 3).flatten(2)
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        return self._packed(query, key, value, packed_seq_params, self.softmax_scale)[:, None].flatten(2)
