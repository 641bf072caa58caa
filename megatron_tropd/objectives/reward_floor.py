"""Two variants of ours, not in the TrOPD paper: a floor under every reward, and a forward KL added to it.

    tropd_floor   PG(max(R, tau)) + (1 - min(1, q(x) / p(x))) c FKL_tail     no coin: the coin's mean is the weight
    clip_fkl      PG(max(R, tau)) + c FKL_k                                  both on every token

Why: where the student puts a small mass on a token that the teacher excludes, the gradient of TrOPD is only of
second order in that mass; that of both variants is of first order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_tropd.objectives.forward_kl import ForwardKl
from megatron_tropd.objectives.gates import Gate, expected_acceptance
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.types import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class FlooredReward:
    """The rules ``tropd_floor`` (``only_rejected``) and ``clip_fkl``."""

    forward_kl: ForwardKl
    only_rejected: bool
    floor: float = -2.0
    coef: float = 1.0
    topk_margin: float | None = None
    """See ``TrustRegion``; of use to ``only_rejected``."""

    def __post_init__(self) -> None:
        if self.floor >= 0:
            raise ValueError(f"--reward-floor {self.floor} must be negative")

    @property
    def needs(self) -> Needs:
        """The teacher's top-k, where a token may be rejected or everywhere."""
        if not self.only_rejected:
            return self.forward_kl.needs
        return replace(self.forward_kl.needs, topk_use=Gate(kind="expected").topk_use(self.topk_margin))

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        reward_T = labels.reward_T
        trust_T = expected_acceptance(reward_T) if self.only_rejected else None
        extra_T = self.coef * self.forward_kl(labels.stats, labels.tokens)
        if trust_T is not None:
            extra_T = (1 - trust_T) * extra_T
        loss_T = labels.policy_gradient(reward_T.clamp(min=self.floor)) + extra_T
        topk_T = None if trust_T is None else trust_T < 1
        return Term(loss_T=loss_T, trust_T=trust_T, clamped_T=reward_T < self.floor, topk_T=topk_T)
