"""Bytes of the vocabulary head, of a KV cache, and of teacher scores on their way to the student."""

from __future__ import annotations

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.ops.vocab_parallel import HeadMode
from megatron_tropd.types import ScoreRequest

JSON_BYTES_PER_LOGPROB = 27
"""Text of one ``[log-probability, id, null], `` in an answer of SGLang, which writes floats in full."""


def head_bytes(
    *, tokens: int, chunk: int, columns: int, hidden: int, itemsize: int, logits: int, mode: HeadMode
) -> int:
    """Return the most bytes of the student's head, beyond hidden states and weight: docs/performance.md.

    C v b of the chunk's logits, 4 v H of the weight's fp32 gradient where it is made in forward, N H b of the hidden
    gradient.

    Args:
        tokens: N, tokens of a micro-batch.
        chunk: C, --logits-chunk-tokens.
        columns: v, rows of the output table on this rank.
        hidden: H.
        itemsize: bytes of a hidden state.
        logits: bytes of a logit.
        mode: --head-mode.
    """
    rows = tokens if mode == "single-chunk" else min(chunk, tokens)
    weight = 0 if mode == "recompute" else 4 * columns * hidden
    return rows * columns * logits + weight + tokens * hidden * itemsize


def kv_bytes(arch: Architecture, itemsize: int) -> int:
    """Return the bytes of the KV cache of one token, over all ranks: a key and a value of every head of every layer."""
    return 2 * arch.num_layers * arch.num_query_groups * arch.head_dim * itemsize


def score_bytes(want: ScoreRequest, *, hidden: int, itemsize: int) -> int:
    """Return the bytes of the scores of one token that the student wrote: ``MegatronTeacher`` sends fp32
    log-probabilities, int32 ids, an fp32 entropy and hidden states in the teacher's dtype."""
    return 4 + 8 * want.top_k + 4 * want.entropy + (hidden * itemsize if want.hidden else 0)


def score_text_bytes(want: ScoreRequest) -> int:
    """Return the bytes of the scores of one token as the JSON text of an SGLang server."""
    return JSON_BYTES_PER_LOGPROB * (1 + want.top_k)
