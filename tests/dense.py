"""Dense float64 oracles: plain autograd over full logits, sharing no code with the package."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.types import Region, TokenStreams


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
