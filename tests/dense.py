"""Dense float64 oracles: plain autograd over full logits, sharing no code with the package."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_tropd.types import Needs, Region, TokenStats, TokenStreams


def make_streams(
    *, num_tokens: int, vocab_size: int, top_k: int, seed: int = 0, regions: list[int] | None = None,
    teacher_scale: float = 2.0,
) -> tuple[TokenStreams, Tensor]:  # fmt: skip
    """Random labels and a random teacher; (streams, teacher logits float64 [T, V])."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64) * teacher_scale
    log_q = teacher.log_softmax(-1)
    label = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    region = torch.tensor(regions) if regions else torch.randint(0, 4, (num_tokens,), generator=generator)
    response = (region == Region.GUIDANCE) | (region == Region.ON_POLICY)
    values, ids = log_q.topk(top_k, -1) if top_k else (None, None)
    return TokenStreams(
        label_T=label, region_T=region.to(torch.uint8), rollout_logprob_T=torch.zeros(num_tokens),
        written_len_T=torch.full((num_tokens,), num_tokens), sample_uid_T=torch.zeros(num_tokens, dtype=torch.long),
        label_position_T=torch.arange(num_tokens),
        uniform_T=torch.rand(num_tokens, generator=generator, dtype=torch.float64),
        teacher_logprob_T=torch.where(response, log_q.gather(1, label[:, None])[:, 0], 0.0).float(),
        teacher_topk_ids_TK=ids,
        teacher_topk_logprob_TK=None if values is None else
        values.float().masked_fill(~response[:, None], -torch.inf),
    ), teacher  # fmt: skip


def tropd_losses(logits: Tensor, tokens: TokenStreams, *, beta: float, gate: str = "bernoulli") -> Tensor:
    """TrOPD (gate bernoulli) or OPD (gate none) of every token that has a loss, by definition, float64."""
    losses = [logits.new_zeros(())]
    log_p = logits.log_softmax(-1)
    for t in range(len(logits)):
        own = log_p[t, tokens.label_T[t]]
        if tokens.region_T[t] == Region.GUIDANCE:
            losses.append(beta * (tokens.teacher_logprob_T[t].double() - own))
        if tokens.region_T[t] != Region.ON_POLICY:
            continue
        ratio = tokens.teacher_logprob_T[t].double() - own.detach()
        if gate == "none" or float(tokens.uniform_T[t]) < float(ratio.exp().clamp(max=1.0)):
            losses.append(-ratio * (own - own.detach()).exp())
            continue
        log_q = tokens.teacher_topk_logprob_TK[t].double()
        losses.append((log_q.exp() * (log_q - log_p[t, tokens.teacher_topk_ids_TK[t]])).sum())
    return torch.stack(losses)


def dense_divergence(logits: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """Full-vocabulary divergence of every row, by definition; differentiable, [T]."""
    p, q = logits.softmax(-1), teacher.softmax(-1)
    mixture = beta * q + (1 - beta) * p
    if kind == "forward_kl":
        return _kl(q, p)
    if kind == "reverse_kl":
        return _kl(p, q)
    return beta * _kl(q, mixture) + (1 - beta) * _kl(p, mixture)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a.log() - b.log())).sum(-1)


def dense_stats(logits: Tensor, teacher: Tensor, tokens: TokenStreams, needs: Needs) -> TokenStats:
    """What the head would report of the student, from whole rows of logits by plain autograd."""
    log_p = logits.log_softmax(-1)
    return TokenStats(
        logprob_T=log_p.gather(1, tokens.label_T[:, None])[:, 0],
        topk_logprob_TK=None if not needs.top_k else log_p.gather(1, tokens.teacher_topk_ids_TK),
        entropy_T=-(log_p.exp() * log_p).sum(-1).detach(),
        divergence_T=dense_divergence(logits, teacher, needs.divergence, needs.divergence_beta)
        if needs.divergence
        else None,
    )


def random_batch(
    *, num_tokens: int, vocab_size: int, top_k: int, seed: int, scale: float = 2.0, ties: bool = False,
    excluded: bool = False, several_updates: bool = False, models: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, TokenStreams]:  # fmt: skip
    """(student logits, teacher logits, streams with every optional entry), all float64.

    Regions are ragged; samples are runs of labels; ``scale`` of 80 gives logits to +-80 and beyond; ``ties`` rounds
    them; ``excluded`` gives every fourth sampled token no teacher mass.  ``models`` are (student, teacher) logits to use
    instead of random ones.
    """
    streams, teacher = make_streams(
        num_tokens=num_tokens, vocab_size=vocab_size, top_k=0, seed=seed,
        regions=torch.randint(0, 5, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist(),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(num_tokens, generator=generator, dtype=torch.float64)

    teacher = (teacher / teacher.abs().max() * scale).round() if ties else teacher / teacher.abs().max() * scale
    noise = torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64)
    logits = 0.7 * teacher + (scale / 3 * noise).clamp(-scale, scale)
    logits = logits.round() if ties else logits
    if models is not None:
        logits, teacher = models
    label = torch.where(streams.label_T % 2 == 0, logits.argmax(-1), streams.label_T)  # likely tokens and any tokens
    if excluded:
        rows = torch.arange(0, num_tokens, 4)
        teacher[rows, label[rows]] = -torch.inf
    log_q, log_p = teacher.log_softmax(-1), logits.log_softmax(-1)
    values, ids = log_q.topk(top_k, -1)
    response = (streams.region_T == Region.GUIDANCE) | (streams.region_T == Region.ON_POLICY)
    values = values.masked_fill(~response[:, None], -torch.inf)
    own = log_p.gather(1, label[:, None])[:, 0]
    written = streams.region_T == Region.ON_POLICY
    sample = torch.arange(num_tokens) // 7
    start = torch.zeros(num_tokens, dtype=torch.bool)
    for index in sample.unique():
        start[(written & (sample == index)).nonzero()[:1, 0]] = True
    old = (own + uniform(-0.6, 0.6)).clamp(max=0.0)
    return logits, teacher, replace(
        streams, label_T=label, teacher_logprob_T=log_q.gather(1, label[:, None])[:, 0].masked_fill(~response, 0.0),
        teacher_topk_ids_TK=ids, teacher_topk_logprob_TK=values,
        teacher_entropy_T=-(log_q.exp() * log_q).nan_to_num(0.0).sum(-1),
        rollout_logprob_T=torch.where(written, (own + uniform(-2.0, 2.0)).clamp(max=0.0), 0.0),
        reference_logprob_T=(own + uniform(-3.0, 3.0)).clamp(max=0.0), advantage_T=torch.where(written, uniform(-2.0, 2.0), 0.0),
        sequence_error_T=uniform(1.0, 3.0), sample_uid_T=sample, sample_start_T=start,
        written_len_T=torch.stack([(written & (sample == index)).sum() for index in sample]),
        old_logprob_T=old if several_updates else None,
        old_entropy_T=uniform(0.0, 3.0) if several_updates else None,
    )  # fmt: skip
