"""Supervised finetuning: token cross-entropy on the responses of the data.  No teacher, no rollouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tropd.objectives.base import Regions, mean_over
from megatron_tropd.types import LossOutput, Needs, StepContext, TokenStats, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervised:
    """L = -log p(y) on GUIDANCE labels, which are then whole responses; divided by their number."""

    @property
    def needs(self) -> Needs:
        """Nothing but the data."""
        return Needs(teacher=False, rollouts=False)

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """See the class."""
        guidance_T = Regions.of(tokens).guidance_T
        metrics = {"tropd/guidance_nll": mean_over(-stats.logprob_T, guidance_T)}
        if stats.entropy_T is not None:
            metrics["student/guidance_entropy"] = mean_over(stats.entropy_T, guidance_T)
        return LossOutput(token_loss_T=torch.where(guidance_T, -stats.logprob_T, 0.0), metrics=metrics)
