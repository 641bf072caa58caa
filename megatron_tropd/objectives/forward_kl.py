"""Forward KL on the teacher's top-k ids V (TrOPD Eq. 3), with Q and P the mass of q and p on V:

raw          sum_V q log(q / p)                                its minimum puts no mass outside V
renorm       raw / Q - log Q                                   KL from q / Q to the full p
renorm_both  sum_V (q / Q) log((q / Q) / (p / P))              does not depend on P
tail         raw + (1 - Q) log((1 - Q) / (1 - P))              all ids outside V are one bucket; zero at p = q
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.objectives.settings import FklGrad, FklSupport
from megatron_tropd.types import Needs, TokenStats, TokenStreams

_MAX_MASS = 1 - 1e-6
"""Largest mass P of the student on V in the tail bucket, so that log(1 - P) stays finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardKl:
    """The divergence, differentiated through p.  The clamps are veRL's and off by default."""

    top_k: int
    support: FklSupport = "raw"
    clamp_zero: bool = False
    """A negative value becomes 0 and loses its gradient."""
    logprob_min: float = 0.0
    """Floor of log-probabilities; a student log-probability below the floor loses its gradient.  0 for no floor."""
    maximum: float = 0.0
    """Ceiling of the value; a larger value loses its gradient.  0 for no ceiling."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"--top-k {self.top_k}: a top-k forward KL needs at least 1 teacher token")
        if self.logprob_min > 0 or self.maximum < 0:
            raise ValueError(
                f"--fkl-logprob-min {self.logprob_min} must not be positive, --fkl-max {self.maximum} not negative"
            )

    @property
    def needs(self) -> Needs:
        """The teacher's top-k."""
        return Needs(top_k=self.top_k)

    def __call__(self, stats: TokenStats, tokens: TokenStreams) -> Tensor:
        """The divergence, [T]; 0 where the teacher sent no mass.

        Raises:
            ValueError: the teacher sent no top-k.
        """
        log_q, log_p = top_k_logprobs(stats, tokens)
        if self.support.startswith("renorm"):
            log_q = log_q - _log_mass(log_q)
        if self.support == "renorm_both":
            log_p = log_p - _log_mass(log_p)
        q = log_q.exp()
        if self.logprob_min:
            log_q, log_p = log_q.clamp(min=self.logprob_min), log_p.clamp(min=self.logprob_min)
        value_T = (q * (torch.where(q > 0, log_q, 0.0) - log_p)).sum(-1)  # q = 0 contributes 0, not 0 * inf
        if self.support == "tail":
            value_T = value_T + _bucket(q.sum(-1), log_p)
        if self.clamp_zero:
            value_T = value_T.clamp(min=0.0)
        return value_T.clamp(max=self.maximum) if self.maximum else value_T


def top_k_logprobs(stats: TokenStats, tokens: TokenStreams) -> tuple[Tensor, Tensor]:
    """(teacher's, student's) log-probabilities at the ids of the top-k, [T, K]."""
    if stats.topk_logprob_TK is None or tokens.teacher_topk_logprob_TK is None:
        raise ValueError("this objective needs log-probabilities at a top-k; the teacher sent only sampled tokens")
    return tokens.teacher_topk_logprob_TK, stats.topk_logprob_TK


def _log_mass(logprob_TK: Tensor) -> Tensor:
    """log of the mass on V, [T, 1]; 0 where there is no mass, so that the log-probabilities there stay -inf."""
    mass_T = logprob_TK.logsumexp(-1, keepdim=True)
    return torch.where(mass_T == -torch.inf, 0.0, mass_T)


def _bucket(mass_q_T: Tensor, log_p_TK: Tensor) -> Tensor:
    """(1 - Q) log((1 - Q) / (1 - P)), [T]; 0 where the teacher sent no mass."""
    rest_q_T = (1 - mass_q_T).clamp(min=0.0)
    mass_p_T = log_p_TK.exp().sum(-1).clamp(max=_MAX_MASS)
    bucket_T = torch.xlogy(rest_q_T, rest_q_T) - rest_q_T * torch.log1p(-mass_p_T)
    return torch.where(mass_q_T > 0, bucket_T, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardKlEverywhere:
    """The rule: forward KL on every token the student wrote (``fkl``, ``fkl_reward``) or, with ``of_data``, on every
    token of the responses of the data (``kd``).

    As a detached reward its mean gradient is zero, because it does not depend on the sampled token; that form
    exists only to replicate published collapses (docs/objectives.md, the forward KL).
    """

    forward_kl: ForwardKl
    grad: FklGrad = "direct"
    of_data: bool = False

    @property
    def needs(self) -> Needs:
        """The teacher's top-k."""
        return replace(self.forward_kl.needs, rollouts=not self.of_data)

    def __call__(self, labels: Labels) -> Term:
        """FKL, or PG(-FKL)."""
        divergence_T = self.forward_kl(labels.stats, labels.tokens)
        return Term(loss_T=divergence_T if self.grad == "direct" else labels.policy_gradient(-divergence_T))
