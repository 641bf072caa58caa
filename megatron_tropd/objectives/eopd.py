"""EOPD (arXiv 2603.07079): K1 everywhere, and a forward KL where the teacher itself is unsure.

L = PG(R) + 1[H_q > threshold] c FKL_k        H_q over the full vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from megatron_tropd.objectives.forward_kl import ForwardKl
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.types import Needs, TopkUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Eopd:
    """The rule ``eopd``."""

    forward_kl: ForwardKl
    entropy_threshold: float = 0.8
    coef: float = 1.0
    only_unsure_topk: bool = False
    """Ask for the top-k only where the teacher is unsure, which it knows exactly."""

    @property
    def needs(self) -> Needs:
        """The teacher's top-k and its entropy."""
        use = TopkUse(kind="teacher_entropy", limit=self.entropy_threshold) if self.only_unsure_topk else None
        return replace(self.forward_kl.needs, teacher_entropy=True, topk_use=use)

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        entropy_T = labels.tokens.teacher_entropy_T
        if entropy_T is None:
            raise ValueError("eopd needs the teacher's full-vocabulary entropy; the teacher did not send it")
        unsure_T = entropy_T > self.entropy_threshold
        divergence_T = self.forward_kl(labels.stats, labels.tokens)
        extra_T = torch.where(unsure_T, self.coef * divergence_T, 0.0)
        return Term(loss_T=labels.policy_gradient(labels.reward_T) + extra_T, selected_T=unsure_T, topk_T=unsure_T)
