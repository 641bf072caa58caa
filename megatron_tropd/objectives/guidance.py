"""Loss of a token in a teacher prefix (TrOPD Eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_tropd.objectives.base import negative_infinity_to
from megatron_tropd.objectives.importance import policy_gradient
from megatron_tropd.objectives.settings import GuidanceGrad
from megatron_tropd.types import TokenStats, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """beta (log q(y) - log p(y)) of a teacher token y ~ q: one-sample forward KL.

    ``nll``              differentiated through log p: imitation; log q only shifts the value
    ``logratio_reward``  the same value as a policy gradient, whose direction is AWAY from the teacher; for
                         replication (docs/objectives.md, methods)
    """

    beta: float = 0.0
    grad: GuidanceGrad = "nll"

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"--guidance-beta {self.beta} must not be negative")

    def __call__(self, stats: TokenStats, tokens: TokenStreams) -> Tensor:
        """The loss of every label as if it were GUIDANCE, [T]."""
        log_q_T = negative_infinity_to(tokens.teacher_logprob_T, 0.0)
        if self.grad == "nll":
            return self.beta * (log_q_T - stats.logprob_T)
        return policy_gradient(self.beta * (stats.logprob_T.detach() - log_q_T), stats, tokens)
