"""Reverse KL on the student's own top-k ids V, with P and Q the mass of p and q on V:

raw          sum_V p log(p / q)
renorm_both  sum_V (p / P) log((p / P) / (q / Q))              does not depend on P
tail         raw + (1 - P) log((1 - P) / (1 - Q))              all ids outside V are one bucket; zero at p = q

By the data-processing inequality ``tail`` is at most the exact reverse KL (``full_rkl``), and it misses only what p and
q say about ids outside V.  The teacher sends K numbers per token for it instead of a hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tropd.objectives.forward_kl import top_k_logprobs
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.objectives.settings import RklSupport
from megatron_tropd.types import Needs

_MAX_MASS = 1 - 1e-4
"""Largest masses P and Q in the tail bucket: in fp32 a mass near 1 is known to 1e-7, so log(1 - Q) then to 1e-3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseKlOnOwnTopK:
    """The rule: the divergence, differentiated through p, on every token the student wrote (``topk_rkl``)."""

    top_k: int
    support: RklSupport = "tail"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"--top-k {self.top_k}: a top-k reverse KL needs at least 1 of the student's tokens")

    @property
    def needs(self) -> Needs:
        """The teacher's log-probabilities at the student's top-k."""
        return Needs(top_k=self.top_k, topk_of="student")

    def __call__(self, labels: Labels) -> Term:
        """RKL, [T]; ids that the teacher excludes are left out of V."""
        log_q, log_p = top_k_logprobs(labels.stats, labels.tokens)
        there = log_q > -torch.inf
        log_q, log_p = torch.where(there, log_q, 0.0), torch.where(there, log_p, 0.0)
        p, q = torch.where(there, log_p.exp(), 0.0), torch.where(there, log_q.exp(), 0.0)
        mass_p, mass_q = p.sum(-1), q.sum(-1)
        loss_T = (p * (log_p - log_q)).sum(-1)
        if self.support == "renorm_both":
            some = there.any(-1)
            mass_p, mass_q = torch.where(some, mass_p, 1.0), torch.where(some, mass_q, 1.0)
            loss_T = loss_T / mass_p - mass_p.log() + mass_q.log()
        elif self.support == "tail":
            rest_p, rest_q = 1 - mass_p.clamp(max=_MAX_MASS), 1 - mass_q.clamp(max=_MAX_MASS)
            loss_T = loss_T + rest_p * (rest_p / rest_q).log()
        return Term(loss_T=loss_T)
