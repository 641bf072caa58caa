"""Split of an objective's gradient by region: the same loss, restricted to one region at a time.

The four regions are a partition of the labels that have a loss, so their gradients add up to the gradient of
the whole loss.  A label is trusted by the objective's own gate (a soft weight is compared with the label's coin) or,
for an objective without a gate, by the paper's coin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_tropd.objectives.base import Objective, Regions, student_before
from megatron_tropd.objectives.distillation import Distillation
from megatron_tropd.objectives.gates import expected_acceptance
from megatron_tropd.types import LossOutput, Needs, StepContext, TokenStats, TokenStreams

GradientRegion = Literal["trusted_positive", "trusted_negative", "rejected", "guidance"]
GRADIENT_REGIONS: tuple[GradientRegion, ...] = get_args(GradientRegion)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlyRegion:
    """An objective whose loss is that of ``objective`` in one region and exactly 0 elsewhere; no metrics.

    The denominator stays that of the whole objective.
    """

    objective: Objective
    region: GradientRegion

    @property
    def needs(self) -> Needs:
        """The needs of the whole objective."""
        return self.objective.needs

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """See the class."""
        out = self.objective(stats, tokens, context)
        inside_T = region_masks(self.objective, stats, tokens, context)[self.region]
        return replace(out, token_loss_T=torch.where(inside_T, out.token_loss_T, 0.0), metrics={})


def only_region(objective: Objective, region: GradientRegion) -> Objective:
    """``objective`` with every token loss outside ``region`` set to zero."""
    return OnlyRegion(objective=objective, region=region)


@torch.no_grad()
def region_masks(
    objective: Objective, stats: TokenStats, tokens: TokenStreams, context: StepContext
) -> dict[GradientRegion, Tensor]:
    """Boolean mask [T] of every region.

    Without a teacher every token that the student wrote is trusted, and the group advantage takes the place of
    the reward.
    """
    regions = Regions.of(tokens)
    on_policy_T = regions.on_policy_T
    reward_T = torch.where(on_policy_T, tokens.teacher_logprob_T - student_before(stats, tokens), 0.0)
    if not objective.needs.teacher:
        reward_T = torch.zeros_like(reward_T) if tokens.advantage_T is None else tokens.advantage_T
        weight_T = torch.ones_like(reward_T)
    elif isinstance(objective, Distillation):
        weight_T = objective.trust(stats, tokens, context)
    else:
        weight_T = expected_acceptance(reward_T)
    trusted_T = on_policy_T & (tokens.uniform_T < weight_T)
    return {
        "trusted_positive": trusted_T & (reward_T > 0),
        "trusted_negative": trusted_T & (reward_T <= 0),
        "rejected": on_policy_T & ~trusted_T,
        "guidance": regions.guidance_T,
    }
