"""REOPOLD (arXiv 2603.11137): a reward bounded from below, then selection in two stages.

    L = M PG(max(R, c)), divided by the number of tokens with M = 1

    stage 1, step < switch * steps:  M = 1[R >= c]        stage 2:  M = 1[H_p >= h], the top share by entropy

The bound comes from a mixture with weight l: log((l p + (1 - l) q) / p) >= max(log l, (1 - l) R), so that
c = log(l) / (1 - l) (``jensen``); others read the paper's Eq. 7 as log(l / (1 - l)) (``logit``).
Without stages the method is clip_outlier with tau = c, which is what TrOPD's Table 3 calls REOPOLD.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_tropd.objectives.entropy_selection import above_entropy_threshold
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.types import Needs


def reward_bound(mixture: float, reading: Literal["jensen", "logit"]) -> float:
    """c(lambda) of the module's docstring, in nats."""
    limit = 1.0 if reading == "jensen" else 0.5
    if not 0 < mixture < limit:
        raise ValueError(f"--reopold-lambda {mixture} must be in (0, {limit}) for --reopold-bound {reading}")
    return math.log(mixture) / (1 - mixture) if reading == "jensen" else math.log(mixture / (1 - mixture))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReopoldTwoStage:
    """The rule ``reopold_two_stage``."""

    bound: float
    entropy_share: float = 0.2
    switch: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.entropy_share <= 1 or not 0 <= self.switch <= 1:
            raise ValueError(
                f"--entropy-share {self.entropy_share} must be in (0, 1], --reopold-switch {self.switch} in [0, 1]"
            )

    @property
    def needs(self) -> Needs:
        """The quantile of the batch, for the second stage."""
        return Needs(entropy_quantile=self.entropy_share)

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        context, below_T = labels.context, labels.reward_T < self.bound
        first = context.step < self.switch * context.num_steps
        kept_T = ~below_T if first else above_entropy_threshold(labels)
        advantage_T = torch.where(kept_T, labels.reward_T.clamp(min=self.bound), 0.0)
        return Term(
            loss_T=labels.policy_gradient(advantage_T),
            clamped_T=below_T & kept_T,
            selected_T=kept_T,
            counted_T=kept_T,
        )
