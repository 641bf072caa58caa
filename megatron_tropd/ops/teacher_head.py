"""The teacher's head: log-probability of given labels, exact top-k and entropy, a chunk of logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.ops.shard import VocabShard
from megatron_tropd.ops.source import LogitsSource
from megatron_tropd.ops.topk import exact_topk
from megatron_tropd.types import TeacherScores


def teacher_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, *, top_k: int = 0, entropy: bool = False
) -> TeacherScores:
    """Log-probability of ``labels`` [N], exact top-k and full-vocabulary entropy of frozen logits, which stay in the
    model's dtype.  Waits for the device, to check the numbers.

    ``hidden`` is [N, H]; the result is the same on every rank of the group.  A label beyond the
    vocabulary (a row only the student has) has log-probability -inf, as has an id whose logit is -inf.

    Raises:
        ValueError: ``top_k`` exceeds the vocabulary; a logit is NaN or +inf (raised on every rank of the group).
    """
    scores = unchecked_teacher_scores(hidden, weight, labels, shard, top_k=top_k, entropy=entropy)
    if problem := nan_problem(scores.logprob):
        raise ValueError(problem)
    return scores


def nan_problem(logprob: Tensor) -> str:
    """Return what is wrong with log-probabilities [N] of which some are NaN; empty if none is."""
    bad = int(logprob.isnan().sum())
    if not bad:
        return ""
    return (
        f"the model gives NaN probabilities at {bad} of {len(logprob)} tokens: its weights or activations hold NaN or "
        "infinity"
    )


@torch.no_grad()
def unchecked_teacher_scores(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: VocabShard,
    *,
    top_k: int = 0,
    entropy: bool = False,
    at: Tensor | None = None,
) -> TeacherScores:
    """As :func:`teacher_scores`, without a wait for the device (with ``top_k`` only where Triton runs): a token with a
    logit that is NaN or +inf has a NaN for its log-probability.  With ``at`` [n, K] the log-probabilities are at these
    ids instead of at the most probable."""
    if top_k > shard.vocab_size:
        raise ValueError(f"--top-k {top_k} is larger than the vocabulary of {shard.vocab_size}")
    source = LogitsSource(
        hidden=hidden,
        weight=weight[: shard.num_valid],
        labels=labels,
        ids=labels.new_zeros(len(labels), 0) if at is None else at,
        shard=shard,
        chunk_tokens=shard.chunk_tokens,
        dtype=hidden.dtype,
    )
    logprobs, entropies, ids, values = [], [], [], []
    for _, _, chunk in source.chunks(torch.arange(len(labels), device=hidden.device)):
        stats = source.statistics(chunk)
        logprobs.append(stats.label_logprob)
        entropies.append(stats.entropy)
        if at is not None:
            values.append(stats.id_logprobs)
        elif top_k:
            chunk_ids, logits = exact_topk(chunk.student, top_k, shard)
            ids.append(chunk_ids.int())
            values.append(logits - stats.maximum[:, None] - stats.log_sum[:, None])
    logprob = torch.cat(logprobs)  # NaN wherever any logit of the row is
    return TeacherScores(
        logprob=logprob.masked_fill((labels >= shard.vocab_size) & ~logprob.isnan(), -torch.inf),
        topk_ids=at.int() if at is not None else torch.cat(ids) if top_k else None,
        topk_logprobs=torch.cat(values) if values else None,
        entropy=torch.cat(entropies) if entropy else None,
    )
