"""Entropy OPD: K1 on the tokens where the student is least sure (after the 80/20 rule, arXiv 2506.01939).

L = 1[H_p >= h] PG(R)        h the (1 - share) quantile over the on-policy tokens of the global batch
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.objectives.base import student_entropy
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.objectives.settings import Denominator
from megatron_tropd.types import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropySelection:
    """The rule ``entropy_opd``."""

    share: float = 0.2
    denominator: Denominator = "all"
    """Divide by ``all`` on-policy tokens, as in 2506.01939, or only by the tokens that are ``kept``."""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"--entropy-share {self.share} must be in (0, 1]")

    @property
    def needs(self) -> Needs:
        """The entropy quantile of the batch."""
        return Needs(entropy_quantile=self.share)

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        kept_T = above_entropy_threshold(labels)
        loss_T = labels.policy_gradient(torch.where(kept_T, labels.reward_T, 0.0))
        return Term(loss_T=loss_T, selected_T=kept_T, counted_T=kept_T if self.denominator == "kept" else None)


def above_entropy_threshold(labels: Labels) -> Tensor:
    """Boolean [T], true where the student's entropy is in the batch's top share."""
    if labels.context.entropy_threshold is None:
        raise ValueError("this objective needs the entropy threshold of the global batch, which was not computed")
    return student_entropy(labels.stats, labels.tokens) >= labels.context.entropy_threshold
