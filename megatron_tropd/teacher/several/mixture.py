"""The scores of a weighted mixture of teachers from the scores of each.  Pure.

The mixture q = sum_i w_i q_i of the teachers' distributions gives

    log q(x)  = log sum_i w_i q_i(x)                   of every response token x, exactly
    top-k     = the k most probable ids of sum_i w_i q_i 1[x in top-k of q_i]

A teacher sends only its own top-k, so an id that is in the top-k of some teachers only counts with their shares.  The
probabilities that are left out sum to at most what the teachers have outside their top-k.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tropd.types import TeacherScores


def mix(parts: Sequence[TeacherScores], weights: Sequence[float]) -> TeacherScores:
    """Return the scores of one rollout by the mixture.

    Args:
        parts: of each teacher, all with a top-k of one size or all without.
        weights: of each teacher; they sum to 1.

    Raises:
        ValueError: entropies or hidden states were asked for: those of a mixture do not follow from the teachers' own.
    """
    if any(part.entropy is not None or part.hidden is not None for part in parts):
        raise ValueError("a mixture of teachers has no entropy and no hidden states to give")
    logprob = _log_mean(torch.stack([part.logprob for part in parts]), weights)
    if parts[0].topk_ids is None:
        return TeacherScores(logprob=logprob)
    ids = torch.cat([part.topk_ids for part in parts if part.topk_ids is not None], dim=1)
    shares = [
        part.topk_logprobs + torch.tensor(weight).log()
        for part, weight in zip(parts, weights, strict=True)
        if part.topk_logprobs is not None
    ]
    topk_ids, topk_logprobs = _merge(ids, torch.cat(shares, dim=1), parts[0].topk_ids.shape[1])
    return TeacherScores(logprob=logprob, topk_ids=topk_ids, topk_logprobs=topk_logprobs)


def _log_mean(logprobs: Tensor, weights: Sequence[float]) -> Tensor:
    """log sum_i w_i exp(logprobs[i]); [teachers, R] -> [R]."""
    return (logprobs + torch.tensor(weights).log()[:, None]).logsumexp(0)


def _merge(ids: Tensor, logs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Add up the probabilities of equal ids in every row [W, N] and return the k largest, by (probability descending,
    id ascending), as ids [W, k] and log-probabilities [W, k]."""
    ids, order = ids.sort(dim=1, stable=True)
    probabilities = logs.gather(1, order).double().exp()
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    group = starts.cumsum(1) - 1  # of equal ids, by ascending id
    sums = torch.zeros_like(probabilities).scatter_add_(1, group, probabilities)
    group_ids = torch.zeros_like(ids).scatter_(1, group, ids)
    best = sums.sort(dim=1, descending=True, stable=True)  # equal sums stay by ascending id; empty groups have 0
    return group_ids.gather(1, best.indices[:, :k]), best.values[:, :k].log().float()
