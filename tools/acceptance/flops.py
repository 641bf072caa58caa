"""Floating-point operations of a model by counting, and what a GPU could do at most.  Dense models."""

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
    """Return the parameters of one layer that are factors of matrix products."""
    heads = arch.num_attention_heads + 2 * arch.num_query_groups
    attention = arch.hidden_size * heads * arch.head_dim + arch.num_attention_heads * arch.head_dim * arch.hidden_size
    return attention + 3 * arch.hidden_size * arch.ffn_hidden_size


def num_parameters(arch: Architecture) -> int:
    """Return all parameters."""
    norms = 2 * arch.hidden_size + (2 * arch.head_dim if arch.qk_norm else 0)
    tables = (1 if arch.tie_word_embeddings else 2) * arch.vocab_size * arch.hidden_size
    return arch.num_layers * (layer_parameters(arch) + norms) + tables + arch.hidden_size


def forward_flops(arch: Architecture, lengths: Sequence[int], labels: int) -> int:
    """Return the FLOPs of a forward pass over sequences of these lengths, of which ``labels`` tokens reach the head.

    Two for every parameter that is a factor of a product and every token; and for every layer, head and pair of a token
    with itself or one before it, 2 head_dim for the score and 2 head_dim for the value.  A backward pass has twice as
    many.  Padding, and a second forward pass to save memory, are no FLOPs of the model.
    """
    layers = 2 * arch.num_layers * layer_parameters(arch) * sum(lengths)
    head = 2 * arch.vocab_size * arch.hidden_size * labels
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return layers + head + 4 * arch.num_layers * arch.num_attention_heads * arch.head_dim * pairs
