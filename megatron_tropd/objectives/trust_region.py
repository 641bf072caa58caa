"""OPD, the outlier baselines, TrOPD and AOPD: a gate, a trusted term, and a term for rejected tokens.

    L = PG(w R)                            mask
    L = PG(w R + (1 - w) tau)              clip
    L = PG(w R) + (1 - w) c FKL_k          forward_kl, differentiated      (TrOPD Eq. 7, 9)
    L = PG(w R - (1 - w) c FKL_k)          forward_kl as a detached reward

with R = log q(x) - log p(x) and w from ``gates.py``.  OPD is w = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from megatron_tropd.objectives.forward_kl import ForwardKl
from megatron_tropd.objectives.gates import Gate
from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.objectives.settings import FklGrad
from megatron_tropd.types import Needs

Rejected = Literal["mask", "clip", "forward_kl"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion:
    """The rule of most rows in the method table."""

    gate: Gate
    rejected: Rejected = "mask"
    tau: float = -1.72
    """Reward of a rejected token under ``clip``."""
    forward_kl: ForwardKl | None = None
    grad: FklGrad = "direct"
    coef: float = 1.0
    topk_margin: float | None = None
    """Nats by which the rollout engine's log p(x) may be below the trainer's, for tokens that need no top-k; None
    to ask for the top-k of all tokens."""

    def __post_init__(self) -> None:
        if (self.rejected == "forward_kl") != (self.forward_kl is not None):
            raise ValueError(f"a forward KL belongs to rejected='forward_kl', not to {self.rejected!r}")

    @property
    def needs(self) -> Needs:
        """Top-k ids and log-probabilities where a forward KL is used; coins where the gate throws them."""
        coin = self.gate.kind == "bernoulli"
        if self.forward_kl is None:
            return Needs(coin=coin)
        return replace(self.forward_kl.needs, topk_use=self.gate.topk_use(self.topk_margin), coin=coin)

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        weight_T = self.gate(labels)
        rest_T = 1 - weight_T
        # where(), not a product: an untrusted token may have R = -inf, and 0 * inf is NaN.
        advantage_T = torch.where(weight_T > 0, weight_T * labels.reward_T, 0.0)
        clamped_T = None
        if self.rejected == "clip":
            advantage_T = advantage_T + rest_T * self.tau
            clamped_T = rest_T > 0
        extra_T = 0.0 * rest_T
        if self.forward_kl:
            extra_T = self.coef * rest_T * self.forward_kl(labels.stats, labels.tokens)
            if self.grad == "reward":
                advantage_T, extra_T = advantage_T - extra_T.detach(), 0.0 * rest_T
        return Term(
            loss_T=labels.policy_gradient(advantage_T) + extra_T,
            trust_T=weight_T if self.gate.kind != "none" else None,
            clamped_T=clamped_T,
            topk_T=rest_T > 0 if self.forward_kl else None,
        )
