"""Dense float64 oracles: plain autograd over full logits, sharing no code with the package."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.types import Microbatch, Region


def make_batch(
    *, num_tokens: int, vocab_size: int, top_k: int, seed: int = 0, regions: list[int] | None = None,
    teacher_scale: float = 2.0,
) -> tuple[Microbatch, Tensor]:  # fmt: skip
    """A micro-batch with random labels and a random teacher; (batch, teacher logits float64 [T, V])."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64) * teacher_scale
    log_q = teacher.log_softmax(-1)
    label = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    region = torch.tensor(regions) if regions else torch.randint(0, 4, (num_tokens,), generator=generator)
    response = (region == Region.GUIDANCE) | (region == Region.ON_POLICY)
    values, ids = log_q.topk(top_k, -1) if top_k else (None, None)
    return Microbatch(
        token_T=label.roll(1), label_T=label, position_T=torch.arange(num_tokens),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32), max_seqlen=num_tokens,
        region_T=region.to(torch.uint8), rollout_logprob_T=torch.zeros(num_tokens),
        teacher_logprob_T=torch.where(response, log_q.gather(1, label[:, None])[:, 0], 0.0).float(),
        teacher_topk_ids_TK=ids,
        teacher_topk_logprob_TK=None if values is None else
        values.float().masked_fill(~response[:, None], -torch.inf),
        teacher_entropy_T=None, sample_uid_T=torch.zeros(num_tokens, dtype=torch.long),
        label_position_T=torch.arange(num_tokens),
    ), teacher  # fmt: skip


def tropd_losses(logits: Tensor, batch: Microbatch, uniform: Tensor, *, beta: float, gate: str = "bernoulli") -> Tensor:
    """TrOPD (gate bernoulli) or OPD (gate none) of every token that has a loss, by definition, float64."""
    losses = [logits.new_zeros(())]
    log_p = logits.log_softmax(-1)
    for t in range(len(logits)):
        own = log_p[t, batch.label_T[t]]
        if batch.region_T[t] == Region.GUIDANCE:
            losses.append(beta * (batch.teacher_logprob_T[t].double() - own))
        if batch.region_T[t] != Region.ON_POLICY:
            continue
        ratio = batch.teacher_logprob_T[t].double() - own.detach()
        if gate == "none" or float(uniform[t]) < float(ratio.exp().clamp(max=1.0)):
            losses.append(-ratio * (own - own.detach()).exp())
            continue
        log_q = batch.teacher_topk_logprob_TK[t].double()
        losses.append((log_q.exp() * (log_q - log_p[t, batch.teacher_topk_ids_TK[t]])).sum())
    return torch.stack(losses)
