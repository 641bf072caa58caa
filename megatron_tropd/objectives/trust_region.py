"""OPD and TrOPD: one loss made of a gate, a trusted term, an outlier term and a guidance term.

    L_t = w PG(R) + (1 - w) c FKL_k          token written by the student   (TrOPD Eq. 7, 9)
    L_t = beta (log p_T(y_t) - log p_S(y_t))  token of a teacher prefix      (TrOPD Eq. 8)

with R = log p_T - log p_S detached and w from ``gates.py``.  OPD is w = 1 without guidance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_tropd.objectives.base import (
    FklSupport,
    Regions,
    forward_kl_topk,
    guidance_kl,
    mean_over,
    policy_gradient,
    reward,
)
from megatron_tropd.objectives.gates import GateKind, trust_weight
from megatron_tropd.types import LossOutput, Metric, Needs, StepContext, TokenStats, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion:
    """A row of the method table."""

    gate: GateKind
    outlier: Literal["none", "forward_kl"]
    top_k: int = 0
    outlier_coef: float = 1.0
    fkl_support: FklSupport = "raw"
    guidance_beta: float = 0.0
    tau: float = -2.0
    """Only read by ``gate="threshold"``; in nats."""

    def __post_init__(self) -> None:
        if self.outlier == "forward_kl" and self.top_k < 1:
            raise ValueError(f"--top-k {self.top_k}: forward KL on rejected tokens needs at least 1 teacher token")

    @property
    def needs(self) -> Needs:
        """Top-k ids and log-probabilities where a forward KL is used."""
        return Needs(top_k=self.top_k if self.outlier == "forward_kl" else 0)

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        """See the module's docstring; token losses are exactly 0 outside both regions."""
        regions = Regions.of(tokens)
        reward_T = torch.where(regions.on_policy_T, reward(stats, tokens), 0.0)
        weight_T = trust_weight(self.gate, reward_T, tokens.uniform_T, self.tau)
        # where(), not a product: an untrusted token may have R = -inf, and 0 * inf is NaN.
        trusted_T = policy_gradient(torch.where(weight_T > 0, weight_T * reward_T, 0.0), stats.logprob_T)
        loss_T = trusted_T
        if self.outlier == "forward_kl":
            divergence_T = forward_kl_topk(stats, tokens, self.fkl_support)
            loss_T = loss_T + self.outlier_coef * (1 - weight_T) * divergence_T
        loss_T = torch.where(regions.on_policy_T, loss_T, 0.0)
        if self.guidance_beta:
            loss_T = loss_T + torch.where(regions.guidance_T, self.guidance_beta * guidance_kl(stats, tokens), 0.0)
        return LossOutput(token_loss_T=loss_T, metrics=self._metrics(stats, tokens, regions, reward_T, weight_T))

    def _metrics(
        self, stats: TokenStats, tokens: TokenStreams, regions: Regions, reward_T: Tensor, weight_T: Tensor
    ) -> dict[str, Metric]:
        on_policy_T = regions.on_policy_T
        finite_T = on_policy_T & reward_T.isfinite()
        metrics = {
            "tropd/trusted_frac": mean_over(weight_T, on_policy_T),
            "tropd/outlier_frac": mean_over((reward_T < self.tau).float(), on_policy_T),
            "tropd/reward_mean": mean_over(reward_T, finite_T),
            "tropd/k1_trusted": mean_over(reward_T, finite_T, weight_T),
            "tropd/k1_rejected": mean_over(reward_T, finite_T, 1 - weight_T),
            "tropd/guidance_nll": mean_over(-stats.logprob_T, regions.guidance_T),
        }
        if stats.entropy_T is not None:
            metrics["student/entropy"] = mean_over(stats.entropy_T, on_policy_T)
        if stats.topk_logprob_TK is not None and tokens.teacher_topk_logprob_TK is not None:
            metrics["tropd/teacher_topk_mass"] = mean_over(tokens.teacher_topk_logprob_TK.exp().sum(-1), on_policy_T)
            metrics["tropd/student_topk_mass"] = mean_over(stats.topk_logprob_TK.exp().sum(-1), on_policy_T)
            with torch.no_grad():
                divergence_T = forward_kl_topk(stats, tokens, self.fkl_support)
            metrics["tropd/forward_kl_topk"] = mean_over(divergence_T, on_policy_T)
        return metrics
