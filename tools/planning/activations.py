"""Activations: what a layer keeps from forward to backward, and what a forward pass alone needs at one time.

The tensors that autograd saves are listed one by one.  With h the hidden size, a and g the columns of all query and of
all key/value heads, f the feed-forward columns, E experts of e columns of which k see a token, T packed tokens:

    both norms of the layer        input h and output h each; h more each where the norm is not one kernel
    queries and keys               2 a + 2 g where they have norms: the norms' inputs, of which the keys' is a view of
                                   all of q, k and v; a + g more where the norms are not one kernel
    attention                      q, k, v and output: 2 a + 2 g, and an fp32 number for each head; on a padded table of
                                   the sequences a copy of the output too (a)
    SwiGLU                         2 f of both halves and f of the product; 2 f more where it is not one kernel
    experts                        k times h of the token, 2 e and e; 3 e more where they are not one kernel; about 2.5
                                   E of the router

Tensor parallelism divides all but the norms', sequence parallelism those too.  Attention keeps no scores: all kernels
used here are those of FlashAttention (arXiv 2205.14135), which is why ``selective`` recomputation (arXiv 2205.05198)
saves little.  ``full`` recomputation keeps h a layer and everything of the one layer that is in backward.

``tests/test_plan_counts.py`` compares the list without fusion with what Megatron-core's layers keep on a CPU.  The list
with fusion leaves out what is marked above, by reading, and has not been measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from tools.acceptance.flops import layers_flops

Recompute = Literal["none", "selective", "full"]
_ROUTER = 2.5
"""Numbers a token and expert that the router keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassShape:
    """How a pass over packed tokens is computed."""

    tokens: int
    """T of a micro-batch."""
    itemsize: int
    """Bytes of an activation."""
    sequence_parallel: bool = False
    fused: bool = True
    """Whether norms and SwiGLU are one kernel each and attention reads packed sequences, as on a GPU with --bf16."""


def layer_bytes(arch: Architecture, layout: ParallelLayout, shape: PassShape) -> float:
    """Return the bytes that one layer keeps for its backward pass on one rank, without recomputation."""
    unfused, tp = not shape.fused, layout.tp
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    norms = (4 + 2 * unfused) * arch.hidden_size
    cut = (2.0 + unfused) * queries + 2 * keys
    if arch.qk_norm:
        cut += (2 + unfused) * queries + (2 + unfused) * keys
    dense_tokens = shape.tokens * shape.itemsize
    numbers = 2.0 + arch.num_attention_heads / tp  # fp32: 1 / rms of both norms, log-sum of attention
    if arch.qk_norm:
        numbers += (arch.num_attention_heads + arch.num_query_groups) / tp
    total = 4 * shape.tokens * numbers
    if arch.num_experts:
        total += dense_tokens * (_ROUTER * arch.num_experts + expert_columns(arch, layout, shape))
    else:
        cut += (3 + 2 * unfused) * arch.ffn_hidden_size
    return total + dense_tokens * (norms / (tp if shape.sequence_parallel else 1) + cut / tp)


def expert_columns(arch: Architecture, layout: ParallelLayout, shape: PassShape) -> float:
    """Return the numbers that the experts of a rank keep, for each of the T tokens, with evenly loaded experts.

    Every rank sends k copies of its tokens, and without sequence parallelism tensor-parallel ranks send the same ones,
    so a rank of an expert receives as many as it sends.
    """
    columns = arch.moe_intermediate_size / layout.expert_tp
    copies = arch.num_experts_per_tok / (layout.tp if shape.sequence_parallel else 1) * layout.expert_tp
    return copies * (arch.hidden_size + (3 if shape.fused else 6) * columns)


def repeated(arch: Architecture, layout: ParallelLayout) -> float:
    """Return by how much a forward pass without sequence parallelism exceeds the model's FLOPs: every tensor-parallel
    rank sends its own copy of the same tokens to the experts."""
    if not arch.num_experts or layout.tp == 1:
        return 1.0
    experts = 2.0 * arch.num_layers * 3 * arch.hidden_size * arch.moe_intermediate_size * arch.num_experts_per_tok
    token = layers_flops(arch, 1, 0)
    return 1 + experts * (layout.tp - 1) / token


def training_bytes(
    arch: Architecture, layout: ParallelLayout, stage: int, shape: PassShape, recompute: Recompute, microbatches: int
) -> int:
    """Return the most bytes of activations on a rank of a pipeline stage, without the head's.

    Stage s holds the activations of min(m, PP - s) of the m micro-batches at one time (the 1F1B schedule,
    arXiv 2104.04473).  With v virtual stages it holds those of min(m v, 2 (PP - s - 1) + (v - 1) PP + 1) chunks, each
    1 / v of the stage.
    """
    chunks = layout.chunks
    layers = chunks * len(layout.stage_layers(arch.num_layers, stage))
    hidden = shape.tokens * shape.itemsize * arch.hidden_size / (layout.tp if shape.sequence_parallel else 1)
    whole = layer_bytes(arch, layout, shape)
    kept = layers * (hidden if recompute == "full" else whole)
    if stage == 0:
        kept += hidden  # the embedding's output
    if stage == layout.pp - 1:
        kept += 2 * hidden  # the last norm
    in_flight = float(min(microbatches, layout.pp - stage))
    if chunks > 1:
        in_flight = min(microbatches * chunks, 2 * (layout.pp - stage - 1) + (chunks - 1) * layout.pp + 1) / chunks
    return round(in_flight * kept + (whole if recompute == "full" else 0))


def forward_bytes(arch: Architecture, layout: ParallelLayout, shape: PassShape) -> int:
    """Return about the most bytes of a forward pass that keeps nothing: residual stream and widest part of a layer."""
    queries, keys = arch.num_attention_heads * arch.head_dim, arch.num_query_groups * arch.head_dim
    unfused = not shape.fused
    attention = ((3 + 3 * unfused) * queries + (4 + unfused) * keys) / layout.tp
    if arch.num_experts:
        feed_forward = expert_columns(arch, layout, shape) + 2 * arch.hidden_size
    else:
        feed_forward = (3 + unfused) * arch.ffn_hidden_size / layout.tp
    return round(shape.tokens * shape.itemsize * (3 * arch.hidden_size + max(attention, feed_forward)))
