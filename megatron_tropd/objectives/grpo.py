"""GRPO without a teacher: group advantages, clip-higher, masked importance sampling (arXiv 2402.03300, 2503.14476).

    samples   (1 / N) sum_i (1 / |y_i|) sum_t PG(A_i)       mean over samples of token means
    tokens    sum PG(A_i) / tokens

and optionally + c (ref / p - 1 - log(ref / p)), an estimate of KL(p | ref), differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_tropd.objectives.labels import Labels, Term
from megatron_tropd.types import Needs, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class Grpo:
    """The rule ``grpo``."""

    denominator: Literal["samples", "tokens"] = "samples"
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise ValueError(f"--grpo-kl-coef {self.kl_coef} must not be negative")

    @property
    def needs(self) -> Needs:
        """Rewards instead of a teacher."""
        return Needs(teacher=False, rewards=True, reference_logprob=self.kl_coef > 0)

    def __call__(self, labels: Labels) -> Term:
        """See the module's docstring."""
        tokens = labels.tokens
        if tokens.advantage_T is None:
            raise ValueError("grpo needs group advantages; give a --reward-function")
        loss_T = labels.policy_gradient(tokens.advantage_T)
        if self.kl_coef:
            loss_T = loss_T + self.kl_coef * _kl(labels)
        if self.denominator == "tokens":
            return Term(loss_T=loss_T)
        return Term(loss_T=loss_T / tokens.written_len_T.clamp(min=1), counted_T=_sample_starts(tokens))


def _kl(labels: Labels) -> Tensor:
    reference_T = labels.tokens.reference_logprob_T
    if reference_T is None:
        raise ValueError("--grpo-kl-coef needs the log-probabilities of a reference model; none were sent")
    gap_T = (reference_T - labels.stats.logprob_T).clamp(max=20.0)
    return gap_T.exp() - 1 - gap_T


def _sample_starts(tokens: TokenStreams) -> Tensor:
    if tokens.sample_start_T is None:
        raise ValueError("--grpo-denominator samples counts the first written token of every sample; none was marked")
    return tokens.sample_start_T
