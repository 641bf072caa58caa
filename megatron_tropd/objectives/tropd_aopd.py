"""TrOPD with "the AOPD objective for the AOPD positive samples", which can be read in two ways.

add_pg_on_positive   L_TrOPD + c 1[R > 0] PG(R)        positives, which are always trusted, count 1 + c times
union_fkl            PG(w R) + c 1[R <= 0] FKL_k       non-positive tokens always get the forward KL, and those
                                                       that the gate accepts K1 as well
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.objectives.trust_region import TrustRegion
from megatron_tropd.types import Needs, TopkUse


@dataclass(frozen=True, slots=True, kw_only=True)
class TropdAopd:
    """The rule ``tropd_aopd``.  ``tropd`` is TrOPD without guidance; its gate and its forward KL are used."""

    tropd: TrustRegion
    reading: Literal["add_pg_on_positive", "union_fkl"] = "add_pg_on_positive"
    coef: float = 1.0

    @property
    def needs(self) -> Needs:
        """The needs of TrOPD; ``union_fkl`` reads the top-k where R <= 0."""
        needs, margin = self.tropd.needs, self.tropd.topk_margin
        if self.reading == "union_fkl" and margin is not None:
            return replace(needs, topk_use=TopkUse(kind="reward", margin=margin))
        return needs

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        reward_T = labels.reward_T
        if self.reading == "add_pg_on_positive":
            term = self.tropd(labels)
            extra_T = self.coef * labels.policy_gradient(reward_T.clamp(min=0.0))
            return Term(loss_T=term.loss_T + extra_T, trust_T=term.trust_T, topk_T=term.topk_T)
        assert self.tropd.forward_kl is not None
        weight_T = self.tropd.gate(labels)
        trusted_T = labels.policy_gradient(torch.where(weight_T > 0, weight_T * reward_T, 0.0))
        divergence_T = self.tropd.forward_kl(labels.stats, labels.tokens)
        imitated_T = torch.where(reward_T > 0, 0.0, self.coef * divergence_T)
        return Term(loss_T=trusted_T + imitated_T, trust_T=weight_T, topk_T=reward_T <= 0)
