"""The gate: which tokens are inside the trust region, as a detached weight in [0, 1].

The paper accepts a token with probability min(p_T / p_S, 1) = min(e^R, 1) (TrOPD Eq. 6), the acceptance
rule of speculative decoding; in expectation over p_S a share 1 - TV(p_T, p_S) is accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.objectives.labels import Labels
from megatron_tropd.objectives.settings import GateKind
from megatron_tropd.types import TopkUse


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """Weight of the trusted term.

    ``bernoulli``    1 where log u < R, with one coin u per token of a rollout batch (the paper)
    ``expected``     min(1, e^R): the coin's mean; the same expected gradient without the coin's noise
    ``threshold``    1 where R > threshold
    ``probability``  1 where q(x) - p(x) > margin (AOPD)
    ``none``         1
    R = -inf (the teacher gives the token no mass) is never trusted.
    """

    kind: GateKind
    threshold: float = -1.72
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "threshold" and self.threshold >= 0:
            raise ValueError(f"--outlier-threshold {self.threshold} must be negative: 0 rejects a perfect student")

    def __call__(self, labels: Labels) -> Tensor:
        """The weight, in the dtype of the reward, [T]."""
        reward_T = labels.reward_T
        possible_T = reward_T > -torch.inf
        if self.kind == "expected":
            return expected_acceptance(reward_T)
        if self.kind == "bernoulli":
            trusted_T = labels.tokens.uniform_T.log() < reward_T.double()
        elif self.kind == "threshold":
            trusted_T = reward_T > self.threshold
        elif self.kind == "probability":
            teacher_T = labels.tokens.teacher_logprob_T
            trusted_T = (teacher_T.exp() - labels.behaviour_logprob_T.exp() > self.margin) & possible_T
        else:
            trusted_T = possible_T
        return trusted_T.to(reward_T.dtype)

    def topk_use(self, margin: float | None) -> TopkUse | None:
        """The tokens that this gate may not fully trust; None for all, without a margin [nats]."""
        if margin is None:
            return None
        if self.kind == "bernoulli":
            return TopkUse(kind="bernoulli", margin=margin)
        if self.kind == "probability":
            return TopkUse(kind="probability", limit=self.margin, margin=margin)
        limit = {"expected": 0.0, "threshold": self.threshold, "none": -math.inf}[self.kind]
        return TopkUse(kind="reward", limit=limit, margin=margin)


def expected_acceptance(reward_T: Tensor) -> Tensor:
    """min(1, e^R), the probability that the paper's coin accepts, [T]."""
    return reward_T.clamp(max=0.0).exp()
