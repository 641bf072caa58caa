"""Floating-point operations of a model by counting, and what a GPU could do at most."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tropd.models.architecture import Architecture

PEAK_BF16 = (
    ("H200 NVL", 835e12), ("H100 NVL", 835e12), ("H100 PCIe", 756e12), ("H200", 989e12), ("H100", 989e12),
    ("A100", 312e12),
)  # fmt: skip
"""Dense bf16 FLOP/s by a part of the GPU's name, from NVIDIA's data sheets; the first that fits."""


def peak_of(name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU, None where it is not known."""
    return next((peak for part, peak in PEAK_BF16 if part in name), None)


def layer_parameters(arch: Architecture) -> int:
    """Return the parameters of one layer that are factors of matrix products with a token."""
    return attention_parameters(arch) + expert_parameters(arch)


def attention_parameters(arch: Architecture) -> int:
    """Return the parameters of one layer's four attention products."""
    heads = arch.num_attention_heads + 2 * arch.num_query_groups
    return arch.hidden_size * heads * arch.head_dim + arch.num_attention_heads * arch.head_dim * arch.hidden_size


def expert_parameters(arch: Architecture) -> int:
    """Return the parameters of one layer's feed-forward part that one token meets: all of them in a dense model, else
    the router and ``num_experts_per_tok`` experts."""
    if not arch.num_experts:
        return 3 * arch.hidden_size * arch.ffn_hidden_size
    experts = 3 * arch.hidden_size * arch.moe_intermediate_size * arch.num_experts_per_tok
    return arch.hidden_size * arch.num_experts + experts


def num_parameters(arch: Architecture) -> int:
    """Return all parameters of a dense model."""
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    tables = (1 if arch.tie_word_embeddings else 2) * arch.vocab_size * arch.hidden_size
    return arch.num_layers * (layer_parameters(arch) + norms) + tables + arch.hidden_size


def forward_flops(arch: Architecture, lengths: Sequence[int], labels: int) -> int:
    """Return the FLOPs of a forward pass over sequences of these lengths, of which ``labels`` tokens reach the head.

    Two for every parameter that is a factor of a product and every token; and for every layer, head and pair of a token
    with itself or one before it, 2 head_dim for the score and 2 head_dim for the value.  A backward pass has twice as
    many.  Padding, and a second forward pass to save memory, are no FLOPs of the model.
    """
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return int(layers_flops(arch, sum(lengths), pairs)) + int(head_flops(arch, labels))


def layers_flops(arch: Architecture, tokens: float, pairs: float) -> float:
    """Return the FLOPs of a forward pass through all layers; ``pairs`` as in :func:`forward_flops`."""
    attention = 4 * arch.num_layers * arch.num_attention_heads * arch.head_dim * pairs
    return 2 * arch.num_layers * layer_parameters(arch) * tokens + attention


def head_flops(arch: Architecture, labels: float) -> float:
    """Return the FLOPs of the product with the output table."""
    return 2 * arch.vocab_size * arch.hidden_size * labels
