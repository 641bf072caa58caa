"""Jensen-Shannon divergence, half on the teacher's top-k and half on the sampled token (TrOPD Eq. 4).

    m = beta q + (1 - beta) p
    J = beta sum_V q log(q / m) + (1 - beta) log(p(x) / m(x))

``direct``  the first half is differentiated through p, the second half is PG(-(1 - beta) log(p(x) / m(x)))
``reward``  both halves are a detached reward: PG(-J), as veRL would train it
The second half's reward is at least -(1 - beta) log(1 / (1 - beta)): a soft clip of K1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.objectives.forward_kl import top_k_logprobs
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.objectives.settings import FklGrad
from megatron_tropd.types import Needs, TokenStats, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKJsd:
    """The rule ``jsd``."""

    top_k: int
    beta: float = 0.5
    grad: FklGrad = "direct"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"--top-k {self.top_k}: a JSD needs at least 1 teacher token")
        if not 0 < self.beta < 1:
            raise ValueError(f"--jsd-beta {self.beta} must be in (0, 1); its limits are the methods fkl and opd")

    @property
    def needs(self) -> Needs:
        """The teacher's top-k."""
        return Needs(top_k=self.top_k)

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        teacher_T, student_T = jsd_halves(labels.stats, labels.tokens, labels.reward_T, self.beta)
        if self.grad == "reward":
            return Term(loss_T=labels.policy_gradient(-teacher_T - student_T))
        return Term(loss_T=teacher_T + labels.policy_gradient(-student_T))


def jsd_halves(stats: TokenStats, tokens: TokenStreams, reward_T: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(top-k half, differentiable through p; sampled half, detached), both [T] and weighted."""
    log_q, log_p = top_k_logprobs(stats, tokens)
    log_m = torch.logaddexp(math.log(beta) + log_q, math.log1p(-beta) + log_p)
    teacher_T = beta * (log_q.exp() * (torch.where(log_q > -torch.inf, log_q, 0.0) - log_m)).sum(-1)
    # log(m / p) = log(beta e^R + 1 - beta), finite for R = -inf
    bound = torch.full_like(reward_T, math.log1p(-beta))
    student_T = -(1 - beta) * torch.logaddexp(math.log(beta) + reward_T, bound)
    return teacher_T, student_T
