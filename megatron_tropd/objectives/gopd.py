"""G-OPD (arXiv 2602.12125): extrapolation beyond the teacher, along the line from a reference model.

    L = PG(lambda (log q(x) - log ref(x)) - (log p(x) - log ref(x)))

lambda = 1 is OPD (the reference cancels), lambda > 1 is ExOPD.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.types import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Gopd:
    """The rule ``gopd``."""

    extrapolation: float = 1.25

    def __post_init__(self) -> None:
        if self.extrapolation <= 0:
            raise ValueError(f"--gopd-lambda {self.extrapolation} must be positive")

    @property
    def needs(self) -> Needs:
        """The reference model's log-probability of the sampled token."""
        return Needs(reference_logprob=True)

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring; R = log q - log p is already -inf where the teacher excludes x."""
        reference_T = labels.tokens.reference_logprob_T
        if reference_T is None:
            raise ValueError("gopd needs the log-probabilities of a reference model; none were sent")
        drift_T = labels.behaviour_logprob_T - reference_T
        return Term(
            loss_T=labels.policy_gradient(self.extrapolation * labels.reward_T + (self.extrapolation - 1) * drift_T)
        )
