"""TOP-D (arXiv 2607.04751), which is not TrOPD: the teacher is mixed with the student.

L = PG(log(alpha q(x) / p(x) + 1 - alpha))        bounded below by log(1 - alpha)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.types import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Topd:
    """The rule ``topd``."""

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ValueError(f"--topd-alpha {self.alpha} must be in (0, 1); 1 is the method opd")

    @property
    def needs(self) -> Needs:
        """Nothing besides the log-probability of the sampled token."""
        return Needs()

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring; finite for R = -inf."""
        floor_T = torch.full_like(labels.reward_T, math.log1p(-self.alpha))
        return Term(loss_T=labels.policy_gradient(torch.logaddexp(math.log(self.alpha) + labels.reward_T, floor_T)))
