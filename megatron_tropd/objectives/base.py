"""The interface of an objective, and the helper functions that objectives share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_tropd.types import LossOutput, Metric, Needs, Region, StepContext, TokenStats, TokenStreams


class Objective(Protocol):
    """A pure function of numbers reduced over the vocabulary: no logits, no ranks, no division by counts."""

    @property
    def needs(self) -> Needs:
        """The inputs that the objective has to be given."""
        ...

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """Loss of every label.

        A label's loss depends only on that label's numbers and on ``context``, so the head may pass the labels of
        a batch in any number of parts.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """Boolean masks over labels."""

    on_policy_T: Tensor
    guidance_T: Tensor

    @classmethod
    def of(cls, tokens: TokenStreams) -> Regions:
        """The masks of ``tokens``."""
        return cls(on_policy_T=tokens.region_T == Region.ON_POLICY, guidance_T=tokens.region_T == Region.GUIDANCE)

    @property
    def num_tokens(self) -> Tensor:
        """Tokens the loss is averaged over, int64 scalar (docs/objectives.md, regions and denominators)."""
        return (self.on_policy_T | self.guidance_T).sum()


def mean_over(value_T: Tensor, mask_T: Tensor, weight_T: Tensor | None = None) -> Metric:
    """(Weighted) mean of ``value_T`` over ``mask_T``, kept as a sum and a count; values outside the mask may be
    infinite."""
    weight = mask_T.double() if weight_T is None else torch.where(mask_T, weight_T.detach().double(), 0.0)
    value = torch.where(mask_T, value_T.detach().double(), 0.0)
    return Metric(total=(weight * value).sum(), count=weight.sum())


def student_before(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    """The trainer's log p(x) before the first update on this rollout batch, detached, [T].

    This is ``old_logprob_T`` where the batch holds it.  Otherwise there is one update per batch, and the current
    log p(x) is the same value.
    """
    return stats.logprob_T.detach() if tokens.old_logprob_T is None else tokens.old_logprob_T


def student_entropy(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    """Entropy of the student before the first update on this rollout batch, detached, [T].

    Raises:
        ValueError: neither ``tokens`` nor ``stats`` holds the student's entropy.
    """
    if tokens.old_entropy_T is not None:
        return tokens.old_entropy_T
    if stats.entropy_T is None:
        raise ValueError("this objective selects tokens by the student's entropy, and the head was not asked for it")
    return stats.entropy_T.detach()


def negative_infinity_to(value_T: Tensor, replacement: float) -> Tensor:
    """``value_T`` with ``replacement`` in place of -inf; a NaN stays NaN."""
    return torch.where(value_T == -torch.inf, replacement, value_T)
