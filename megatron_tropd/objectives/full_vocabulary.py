"""Exact divergences over the whole vocabulary: ``full_fkl``, ``full_rkl``, ``gkd_jsd``, and ``vopd``.

They need the teacher's hidden states, from which the head computes the teacher's logits chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.types import Divergence, Needs, TokenStats


@dataclass(frozen=True, slots=True, kw_only=True)
class FullVocabulary:
    """The divergence itself, differentiated: forward KL, reverse KL or generalised JSD (GKD, arXiv 2306.13649)."""

    divergence: Divergence
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(f"--jsd-beta {self.beta} must be in (0, 1); its limits are full_fkl and full_rkl")

    @property
    def needs(self) -> Needs:
        """A divergence over the vocabulary."""
        return Needs(divergence=self.divergence, divergence_beta=self.beta)

    def __call__(self, labels: Labels) -> Term:
        """D(p, q)."""
        return Term(loss_T=_divergence(labels.stats))


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlVariate:
    """vOPD (arXiv 2605.07865): PG(R - V) with the baseline V = E[R] = -KL(p | q); same mean gradient as K1."""

    @property
    def needs(self) -> Needs:
        """The reverse KL."""
        return Needs(divergence="reverse_kl")

    def __call__(self, labels: Labels) -> Term:
        """PG(R + KL(p | q))."""
        return Term(loss_T=labels.policy_gradient(labels.reward_T + _divergence(labels.stats).detach()))


def _divergence(stats: TokenStats) -> Tensor:
    if stats.divergence_T is None:
        raise ValueError("this objective needs a full-vocabulary divergence; the teacher sent no hidden states")
    return stats.divergence_T
