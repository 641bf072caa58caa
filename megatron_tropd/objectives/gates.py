"""Which tokens are inside the trust region: a weight in [0, 1], detached.

The paper accepts a token with probability min(p_T / p_S, 1) = min(e^R, 1) (TrOPD Eq. 6), the acceptance
rule of speculative decoding; in expectation over p_S this accepts 1 - TV(p_T, p_S).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

GateKind = Literal["bernoulli", "expected", "threshold", "none"]


def trust_weight(kind: GateKind, reward_T: Tensor, uniform_T: Tensor, tau: float) -> Tensor:
    """fp32 weight of the trusted term, [T].

    ``bernoulli``  1 where log u < R (the paper)
    ``expected``   min(1, e^R): the coin's mean, same expected gradient without its noise
    ``threshold``  1 where R > tau
    ``none``       1 everywhere (plain OPD)
    R = -inf (the teacher gives the token no mass) is never trusted by the first three.
    """
    if kind == "bernoulli":
        return (uniform_T.log() < reward_T.double()).float()
    if kind == "expected":
        return reward_T.clamp(max=0.0).exp()
    if kind == "threshold":
        return (reward_T > tau).float()
    return torch.ones_like(reward_T)
