"""What each kind of token contributes to the gradient: norms, and how well they agree with the exact reverse KL.

A pass over the first update's rollouts for every region, with the objective's loss left as it is inside the region
and 0 outside; the denominator stays that of the whole, so the regions' gradients add up to the update's.  Compared
with the gradient of the full-vocabulary reverse KL on the student's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tropd.config import TrainConfig
from megatron_tropd.data.packing import PackPlan
from megatron_tropd.objectives.base import Objective, Regions, reward
from megatron_tropd.training.step import Batch, forward_backward
from megatron_tropd.training.student import Student
from megatron_tropd.types import LossOutput, Needs, StepContext, TokenStats, TokenStreams

Mask = Callable[[TokenStats, TokenStreams], Tensor]


def _trusted(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    """The paper's gate, whatever the method's: log u < R."""
    return Regions.of(tokens).on_policy_T & (tokens.uniform_T.log() < reward(stats, tokens).double())


def _trusted_positive(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    return _trusted(stats, tokens) & (reward(stats, tokens) > 0)


def _trusted_negative(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    return _trusted(stats, tokens) & (reward(stats, tokens) <= 0)


def _rejected(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    return Regions.of(tokens).on_policy_T & ~_trusted(stats, tokens)


def _guidance(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    return Regions.of(tokens).guidance_T


REGIONS: dict[str, Mask] = {
    "trusted_positive": _trusted_positive,
    "trusted_negative": _trusted_negative,
    "rejected": _rejected,
    "guidance": _guidance,
}
"""Every label of a loss is in exactly one of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inside:
    """An objective whose loss counts in one region only."""

    objective: Objective
    mask: Mask

    @property
    def needs(self) -> Needs:
        """Those of the objective."""
        return self.objective.needs

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """The objective's answer with its loss set to 0 outside the region."""
        out = self.objective(stats, tokens, context)
        inside_T = self.mask(stats, tokens)
        return replace(out, token_loss_T=torch.where(inside_T, out.token_loss_T, 0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReverseKl:
    """KL(p | q) over the whole vocabulary on the student's tokens: what on-policy distillation descends."""

    @property
    def needs(self) -> Needs:
        """A divergence."""
        return Needs(divergence="reverse_kl")

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """The divergence of every on-policy label."""
        assert stats.divergence_T is not None, "the head was asked for it"
        return LossOutput(token_loss_T=torch.where(Regions.of(tokens).on_policy_T, stats.divergence_T, 0.0))


def diagnostics_due(config: TrainConfig, step: int) -> bool:
    """Whether ``step`` (from 0) is measured: every --gradient-diagnostics-interval steps, the first included."""
    interval = config.logging.gradient_diagnostics_interval
    return bool(interval) and step % interval == 0


def gradient_diagnostics(student: Student, objective: Objective, batch: Batch, plan: PackPlan) -> dict[str, float]:
    """Gradient norm of every region of ``plan`` and its cosine with the exact reverse-KL gradient, by metric name.

    Costs five forward and backward passes and one more copy of the gradient.  A cosine with a gradient of zero is
    absent.  Leaves no gradient behind; collective over the world.
    """

    def gradient(objective: Objective) -> list[Tensor]:
        forward_backward(student, objective, batch, plan)
        return student.gradient()

    exact = [part.clone() for part in gradient(ReverseKl())]
    exact_norm = math.sqrt(student.inner_product(exact, exact))
    metrics = {"gradient/norm_reverse_kl": exact_norm}
    for name, mask in REGIONS.items():
        mine = gradient(Inside(objective=objective, mask=mask))
        norm = math.sqrt(student.inner_product(mine, mine))
        metrics[f"gradient/norm_{name}"] = norm
        if norm and exact_norm:
            metrics[f"gradient/cosine_{name}"] = student.inner_product(mine, exact) / (norm * exact_norm)
    student.zero_grad()
    return metrics
