"""The one policy-gradient term of all methods, with every importance weight it may need.

    PG(A) = -sg[A w] min-clipped r        gradient at r = 1: that of -A w log p(x)

    r = p / p_old   when a rollout batch gets several updates: PPO's ratio, clipped on the side that A pushes to
    w = sg[...]     of k = p_old / mu, the trainer's and the rollout engine's probability of the same token:
        off      1
        tis      min(k, cap)                          truncated importance sampling
        icepop   k where low <= k <= high, else 0     masked importance sampling
        seq_err  k, and 0 in samples whose mean exp |log p_old - log mu| is above a limit
A masked token stays in the denominator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.objectives.base import negative_infinity_to, student_before
from megatron_tropd.objectives.settings import Correction
from megatron_tropd.types import Region, TokenStats, TokenStreams

_MAX_LOG_RATIO = 20.0
"""Limit of log ratios: e^20 is far outside every window, and still finite in fp32 when multiplied by an advantage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Importance:
    """How a policy-gradient term is weighted."""

    correction: Correction = "off"
    tis_cap: float = 2.0
    icepop_low: float = 0.5
    icepop_high: float = 5.0
    sequence_error_max: float = 2.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    num_minibatches: int = 1

    def __post_init__(self) -> None:
        if self.tis_cap <= 0:
            raise ValueError(f"--tis-cap {self.tis_cap} must be positive")
        if not 0 <= self.icepop_low < self.icepop_high:
            raise ValueError(f"--icepop-low {self.icepop_low} must be in [0, --icepop-high {self.icepop_high})")
        if self.sequence_error_max < 1:
            raise ValueError(f"--sequence-error-max {self.sequence_error_max}: exp |difference| is never below 1")
        if not 0 < self.clip_low < 1 or self.clip_high <= 0:
            raise ValueError(f"--ppo-clip {self.clip_low} must be in (0, 1), its upper side {self.clip_high} positive")
        if self.num_minibatches < 1:
            raise ValueError(f"--num-minibatches {self.num_minibatches} must be at least 1")

    @property
    def needs_old_logprob(self) -> bool:
        """Whether the student's log-probabilities before the first update on a rollout batch are needed."""
        return self.num_minibatches > 1 or self.correction == "seq_err"

    def weight(self, stats: TokenStats, tokens: TokenStreams) -> Tensor:
        """w of the module's docstring, detached, [T]; 1 where the student wrote nothing."""
        ratio_T = engine_ratio(stats, tokens)
        if self.correction == "off":
            return torch.ones_like(ratio_T)
        if self.correction == "tis":
            return ratio_T.clamp(max=self.tis_cap)
        return torch.where(self.masked(stats, tokens), 0.0, ratio_T)

    def masked(self, stats: TokenStats, tokens: TokenStreams) -> Tensor:
        """Boolean [T], true where ``seq_err`` masks a token or, under any other correction, where ``icepop`` would."""
        if self.correction == "seq_err":
            if tokens.sequence_error_T is None:
                raise ValueError("--importance-correction seq_err needs the error of every sample; none was computed")
            return tokens.sequence_error_T > self.sequence_error_max
        ratio_T = engine_ratio(stats, tokens)
        return (ratio_T < self.icepop_low) | (ratio_T > self.icepop_high)


def engine_ratio(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    """k = p_old / mu of the sampled token, detached, [T]; 1 where the student wrote nothing."""
    gap_T = student_before(stats, tokens) - tokens.rollout_logprob_T
    written_T = tokens.region_T == Region.ON_POLICY
    return torch.where(written_T, gap_T.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO), 0.0).exp()


def policy_ratio(stats: TokenStats, tokens: TokenStreams) -> Tensor:
    """r = p / p_old, carrying the gradient of log p, [T]; 1 with one update per rollout batch."""
    log_ratio_T = stats.logprob_T - student_before(stats, tokens)
    return log_ratio_T.clamp(max=_MAX_LOG_RATIO).exp()


def policy_gradient(
    advantage_T: Tensor, stats: TokenStats, tokens: TokenStreams, importance: Importance | None = None
) -> Tensor:
    """PG(A) of the module's docstring, [T].

    The advantage is detached: back-propagating log p - log q itself would drop the teacher.  An advantage of
    -inf (the teacher excludes the token) counts as 0.
    """
    importance = importance or Importance()
    gain_T = negative_infinity_to(advantage_T.detach(), 0.0) * importance.weight(stats, tokens)
    ratio_T = policy_ratio(stats, tokens)
    if tokens.old_logprob_T is None:
        return -gain_T * ratio_T
    low, high = 1 - importance.clip_low, 1 + importance.clip_high
    return -torch.minimum(ratio_T * gain_T, ratio_T.clamp(low, high) * gain_T)
