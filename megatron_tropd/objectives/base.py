"""What an objective is, and the three terms every objective of the paper is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_tropd.types import LossOutput, Metric, Needs, Region, StepContext, TokenStats, TokenStreams

FklSupport = Literal["raw", "tail", "renorm"]


class Objective(Protocol):
    """A pure function of reduced numbers: no logits, no ranks, no division by counts."""

    @property
    def needs(self) -> Needs:
        """What it has to be given."""
        ...

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """Loss of every label.  A label's loss depends on that label's numbers and on ``context`` alone: the
        head may show the labels of a batch in any number of parts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """Boolean masks over labels."""

    on_policy_T: Tensor
    guidance_T: Tensor

    @classmethod
    def of(cls, tokens: TokenStreams) -> Regions:
        """The masks of ``tokens``."""
        return cls(on_policy_T=tokens.region_T == Region.ON_POLICY, guidance_T=tokens.region_T == Region.GUIDANCE)

    @property
    def num_tokens(self) -> Tensor:
        """Tokens the loss is averaged over, int64 scalar (algorithms: row 6)."""
        return (self.on_policy_T | self.guidance_T).sum()


def mean_over(value_T: Tensor, mask_T: Tensor, weight_T: Tensor | None = None) -> Metric:
    """(Weighted) mean of ``value_T`` over ``mask_T``, still as sum and count; masked-out values may be
    infinite."""
    weight = mask_T.double() if weight_T is None else torch.where(mask_T, weight_T.detach().double(), 0.0)
    value = torch.where(mask_T, value_T.detach().double(), 0.0)
    return Metric(total=(weight * value).sum(), count=weight.sum())


def policy_gradient(advantage_T: Tensor, logprob_T: Tensor) -> Tensor:
    """PG(A) = -sg[A] exp(log p - sg[log p]), with dL/dz = -A (e_x - p): value -A, score-function gradient.

    The advantage is detached: back-propagating log p - log q itself would drop the teacher.
    """
    return -advantage_T.detach() * (logprob_T - logprob_T.detach()).exp()


def reward(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    """K1 reward R = log q(x) - log p(x) of the sampled token, detached.  R = -inf where q(x) = 0."""
    return tokens.teacher_logprob_T - stats.logprob_T.detach()


def forward_kl_topk(stats: TokenStats, tokens: TokenStreams, support: FklSupport = "raw") -> Tensor:
    """Forward KL on the teacher's top-k ids V, differentiated through p (TrOPD Eq. 3), [T].

    With Q and P the teacher's and the student's mass on V:
    ``raw``     sum_V q log(q / p); its minimum puts nothing outside V
    ``renorm``  raw / Q - log Q, the KL of q / Q from the full p
    ``tail``    raw + (1 - Q) log((1 - Q) / (1 - P)): everything outside V as one bucket; zero at p = q

    Raises:
        ValueError: the teacher sent no top-k.
    """
    if stats.topk_logprob_TK is None or tokens.teacher_topk_logprob_TK is None:
        raise ValueError("this objective needs the teacher's top-k; the teacher sent only sampled log-probabilities")
    log_q, log_p = tokens.teacher_topk_logprob_TK, stats.topk_logprob_TK
    q = log_q.exp()
    raw = (q * (torch.where(q > 0, log_q, 0.0) - log_p)).sum(-1)  # q = 0 contributes 0, not 0 * inf
    if support == "raw":
        return raw
    mass_q = q.sum(-1)
    if support == "renorm":
        present = mass_q > 0
        safe = torch.where(present, mass_q, 1.0)
        return torch.where(present, raw / safe - safe.log(), 0.0)
    rest_q = (1 - mass_q).clamp(min=0.0)
    mass_p = log_p.exp().sum(-1).clamp(max=1 - 1e-6)
    bucket = torch.xlogy(rest_q, rest_q) - rest_q * torch.log1p(-mass_p)
    return raw + torch.where(mass_q > 0, bucket, 0.0)


def guidance_kl(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    """log q(y) - log p(y) of a teacher token y ~ q: one-sample forward KL (TrOPD Eq. 8), [T].

    Its gradient is that of the negative log-likelihood; log q only shifts the value.  Used as a reward
    instead, the same number pushes AWAY from the teacher (algorithms: section 0, finding 3).
    """
    log_q = torch.where(tokens.teacher_logprob_T.isfinite(), tokens.teacher_logprob_T, 0.0)
    return log_q - stats.logprob_T
