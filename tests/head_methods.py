"""What the head is tested with: one row per objective, each with a dense float64 oracle that shares no code with it.

To add a method: a row of HEAD_METHODS.  ``make(top_k)`` gives the objective; ``oracle(logits, tokens, teacher_logits)``
gives, for full float64 logits that carry grad, the losses of single tokens as one tensor (their sum is the loss, the sum
of their magnitudes what its error is relative to).  Objectives that are defined here use what no shipped one does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.objectives.base import Regions
from megatron_tropd.objectives.methods import ObjectiveSettings, make_objective
from megatron_tropd.types import LossOutput, Needs, Region, StepContext, TokenStats, TokenStreams
from tests.dense import tropd_losses

BETA = 0.3
NOTHING = Needs()
STUDENT_ONLY = 3
"""Last ids of the vocabulary that the teacher of a full-vocabulary divergence does not have."""


@dataclass(frozen=True, kw_only=True)
class HeadMethod:
    make: Callable[[int], Any]
    oracle: Callable[[Tensor, TokenStreams, Tensor], Tensor]
    limit_at_80: float = 2e-6
    """Largest relative error with logits of +-80, whose fp32 rounding alone is 4e-6 absolute.  A gradient that multiplies
    probabilities by differences of logits (entropy, reverse KL) carries it over: float64 algebra on logits made in fp32
    is then off by 2e-6 to 6e-6 as well."""


@dataclass(frozen=True, kw_only=True)
class EntropyBonus:
    """-H log-probability-weighted: its gradient runs through the entropy and, by a product, through both."""

    needs: Needs = NOTHING

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        on_policy = Regions.of(tokens).on_policy_T
        return LossOutput(
            token_loss_T=torch.where(on_policy, -0.7 * stats.entropy_T - 0.1 * stats.entropy_T * stats.logprob_T, 0.0)
        )


@dataclass(frozen=True, kw_only=True)
class EveryFifth:
    """A policy gradient on one row of five: most rows have no gradient and are dropped."""

    needs: Needs = NOTHING

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        chosen = Regions.of(tokens).on_policy_T & (tokens.label_position_T % 5 == 1)
        advantage = (0.5 + tokens.uniform_T).float()
        return LossOutput(
            token_loss_T=torch.where(chosen, -advantage * (stats.logprob_T - stats.logprob_T.detach()).exp(), 0.0),
            denominator=chosen.sum(),
        )


@dataclass(frozen=True, kw_only=True)
class FullDivergence:
    """A divergence over the full vocabulary, mixed with the label's log-probability and the entropy."""

    needs: Needs

    def __call__(self, stats: TokenStats, tokens: TokenStreams, context: StepContext) -> LossOutput:
        on_policy = Regions.of(tokens).on_policy_T
        loss = stats.divergence_T - 0.2 * stats.logprob_T - 0.1 * stats.entropy_T
        return LossOutput(token_loss_T=torch.where(on_policy, loss, 0.0))


def _entropy_oracle(logits: Tensor, tokens: TokenStreams, teacher: Tensor) -> Tensor:
    losses = [logits.new_zeros(())]
    for t in (tokens.region_T == Region.ON_POLICY).nonzero().flatten().tolist():
        log_p = torch.log_softmax(logits[t], 0)
        entropy = -(log_p.exp() * log_p).sum()
        losses.append(-0.7 * entropy - 0.1 * entropy * log_p[tokens.label_T[t]])
    return torch.stack(losses)


def _fifth_oracle(logits: Tensor, tokens: TokenStreams, teacher: Tensor) -> Tensor:
    losses = [logits.new_zeros(())]
    for t in (tokens.region_T == Region.ON_POLICY).nonzero().flatten().tolist():
        if t % 5 == 1:
            own = torch.log_softmax(logits[t], 0)[tokens.label_T[t]]
            losses.append(-(0.5 + tokens.uniform_T[t]).float().double() * (own - own.detach()).exp())
    return torch.stack(losses)


def _divergence_oracle(kind: str, beta: float) -> Callable[[Tensor, TokenStreams, Tensor], Tensor]:
    def oracle(logits: Tensor, tokens: TokenStreams, teacher: Tensor) -> Tensor:
        losses = [logits.new_zeros(())]
        common = teacher.shape[1]
        for t in (tokens.region_T == Region.ON_POLICY).nonzero().flatten().tolist():
            log_p, p = torch.log_softmax(logits[t], 0), torch.softmax(logits[t], 0)
            q = torch.zeros_like(p)
            q[:common] = torch.softmax(teacher[t], 0)
            log_q = torch.log_softmax(teacher[t], 0)
            if kind == "forward_kl":
                value = (q[:common] * (log_q - log_p[:common])).sum()
            elif kind == "reverse_kl":
                value = (p[:common] * (log_p[:common] - log_q)).sum()
            else:
                m = beta * q + (1 - beta) * p
                value = beta * torch.special.xlogy(q, q / m).sum() + (1 - beta) * (p * (p / m).log()).sum()
            losses.append(value - 0.2 * log_p[tokens.label_T[t]] + 0.1 * (p * log_p).sum())
        return torch.stack(losses)

    return oracle


def _shipped(name: str) -> Callable[[int], Any]:
    return lambda top_k: make_objective(name, ObjectiveSettings(top_k=max(top_k, 1), guidance_beta=BETA))


def _divergence(kind: Any, beta: float = 0.5) -> HeadMethod:
    objective = FullDivergence(needs=Needs(divergence=kind, divergence_beta=beta))
    return HeadMethod(make=lambda top_k: objective, oracle=_divergence_oracle(kind, beta), limit_at_80=1e-5)


HEAD_METHODS: dict[str, HeadMethod] = {
    "opd": HeadMethod(
        make=_shipped("opd"), oracle=lambda logits, tokens, _: tropd_losses(logits, tokens, beta=BETA, gate="none")
    ),
    "tropd": HeadMethod(
        make=_shipped("tropd"), oracle=lambda logits, tokens, _: tropd_losses(logits, tokens, beta=BETA)
    ),
    "entropy bonus": HeadMethod(make=lambda top_k: EntropyBonus(), oracle=_entropy_oracle, limit_at_80=1e-5),
    "one row of five": HeadMethod(make=lambda top_k: EveryFifth(), oracle=_fifth_oracle),
    "full forward KL": _divergence("forward_kl"),
    "full reverse KL": _divergence("reverse_kl"),
    "full JSD": _divergence("jsd", 0.3),
}
