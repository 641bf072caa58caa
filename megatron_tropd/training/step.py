"""One forward and backward pass over the rollouts of an update, through Megatron's pipeline schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_tropd import rng
from megatron_tropd.data.packing import BatchPlan, PackPlan, pack
from megatron_tropd.data.streams import SampleScores
from megatron_tropd.models.build import forward_hidden
from megatron_tropd.objectives.base import Objective, Regions, mean_over
from megatron_tropd.objectives.checks import check_streams
from megatron_tropd.ops.vocab_parallel import head_loss
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.parallel.fail_together import on_all_ranks
from megatron_tropd.training.student import Student
from megatron_tropd.types import Metric, Microbatch, Needs, Rollout, StepContext, TokenStreams


def _larger(a: float, b: float) -> float:
    """Return the maximum, or NaN if either is NaN (with ``max`` that depends on their order)."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSums:
    """Loss and metrics of a micro-batch, an update or a rollout batch, kept as sums so that they can be added up."""

    loss_sum: float
    denominator: int
    sums: dict[str, tuple[float, float]]
    """By metric: (total, count)."""
    maxima: dict[str, float]
    trust: dict[int, list[float]] = field(default_factory=dict)
    """By index of a rollout in ``Batch.shown``: the gate's weight of every token that the student wrote, [W]."""

    @classmethod
    def of(cls, parts: Sequence[StepSums]) -> StepSums:
        """Combine ``parts``; their order does not matter."""
        sums = {}
        for name in {name for part in parts for name in part.sums}:
            pairs = [part.sums[name] for part in parts if name in part.sums]
            sums[name] = (math.fsum(total for total, _ in pairs), math.fsum(count for _, count in pairs))
        maxima: dict[str, float] = {}
        for part in parts:
            for name, value in part.maxima.items():
                maxima[name] = _larger(value, maxima.get(name, value))
        finite = all(math.isfinite(part.loss_sum) for part in parts)
        return cls(
            loss_sum=math.fsum(part.loss_sum for part in parts) if finite else math.nan,
            denominator=sum(part.denominator for part in parts),
            sums=sums,
            maxima=maxima,
            trust={index: weights for part in parts for index, weights in part.trust.items()},
        )

    @property
    def loss(self) -> float:
        """Sum of token losses / denominator."""
        return self.loss_sum / max(self.denominator, 1)

    @property
    def metrics(self) -> dict[str, float]:
        """Means and maxima by name; a metric whose count is 0 is left out."""
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        return dict(sorted({**means, **self.maxima}.items()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A rollout batch with its scores and what else the loss needs; a plan says which rollouts make an update."""

    rollouts: Sequence[Rollout]
    sample_scores: Mapping[int, SampleScores]
    """By rollout index, for the rollouts of this rank's data-parallel replica; read on its last stage only."""
    context: StepContext
    seed: int
    teacher_hidden: Tensor | None = None
    """[0, H]: gives the width and dtype of the teacher's hidden states; None without a teacher."""
    teacher_weight: Tensor | None = None
    """[v, H]: the teacher's output rows for this rank's vocabulary shard, where teacher logits are computed here."""
    shown: frozenset[int] = frozenset()
    """Indices of the rollouts whose tokens are shown to people, with what the gate decided about them."""


def forward_backward(student: Student, objective: Objective, batch: Batch, plan: PackPlan) -> StepSums:
    """Compute the gradient of the token-mean loss over ``plan`` into the student; collective over the world.

    Division by the global token count happens once, in Megatron's ``finalize_model_grads``.
    Returns sums over the rollouts of ``plan``, the same on every rank.
    """
    student.zero_grad()
    parts: list[StepSums] = get_forward_backward_func(student.groups.layout.pp, None)(
        forward_step_func=partial(_forward_step, student=student, objective=objective, of=batch),
        data_iterator=_microbatches(student, objective, batch, plan),
        model=[student.ddp],
        num_microbatches=plan.num_microbatches,
        seq_length=plan.num_tokens,
        micro_batch_size=1,
        forward_only=False,
    )
    mine = parts if student.groups.reports else []
    return StepSums.of([part for rank_parts in gather_objects(mine) for part in rank_parts])


Packed = tuple[tuple[int, ...], Microbatch]
"""Indices of rollouts in packing order, and the micro-batch made of them."""


def _microbatches(student: Student, objective: Objective, batch: Batch, plan: PackPlan) -> Iterator[Packed]:
    """Yield this replica's micro-batches, on the CPU, with the gate's coins; sample scores on the last stage only."""
    coins = rng.key(batch.seed, rng.Stream.GATE, batch.context.step)
    for indices in plan.microbatches[student.groups.coords.dp]:
        packed = pack(
            [batch.rollouts[i] for i in indices],
            [batch.sample_scores[i] for i in indices] if student.groups.is_last_stage else None,
            num_tokens=plan.num_tokens,
            needs=objective.needs,
            teacher_hidden=batch.teacher_hidden,
        )
        streams = packed.streams
        uniform_T = rng.uniform(coins, streams.sample_uid_T, streams.label_position_T)
        yield indices, replace(packed, streams=replace(streams, uniform_T=uniform_T))


def check_batch(student: Student, objective: Objective, batch: Batch, plan: BatchPlan) -> None:
    """Check every stream against the objective's needs, before any gradient is computed; collective over the world.

    The micro-batches are packed for this check and again for training, so that they need not all be kept in memory.

    Raises:
        ValueError: on every rank; the message names the prompt.
    """

    def look() -> None:
        if not student.groups.reports:
            return
        for minibatch in plan.minibatches:
            for _, microbatch in _microbatches(student, objective, batch, minibatch):
                check_streams(microbatch.streams, objective.needs)

    on_all_ranks(look, ValueError)


def _forward_step(
    microbatches: Iterator[Packed], model: torch.nn.Module, *, student: Student, objective: Objective, of: Batch
) -> tuple[Tensor, Any]:
    indices, microbatch = next(microbatches)
    microbatch = microbatch.to(platform.device())
    hidden = forward_hidden(model, microbatch)
    return hidden, partial(_loss, packed=(indices, microbatch), student=student, objective=objective, of=of)


def _loss(
    hidden: Tensor, *, packed: Packed, student: Student, objective: Objective, of: Batch
) -> tuple[Tensor, Tensor, StepSums]:
    """Return (loss sum, number of tokens, sums to report), as Megatron's per-token loss requires."""
    tokens = packed[1].streams
    out = head_loss(
        hidden,
        student.model.lm_head_weight(),
        tokens,
        student.shard,
        objective,
        of.context,
        sequence_parallel=student.model.config.sequence_parallel,
        settings=student.head(objective.needs),
        teacher_weight=of.teacher_weight,
    )
    parity, maxima = _parity(out.logprob_T, tokens) if objective.needs.rollouts else ({}, {})
    metrics = {**out.metrics, **parity, **_logprobs(out.logprob_T, tokens, objective.needs)}
    part = StepSums(
        loss_sum=float(out.loss.detach()),
        denominator=int(out.denominator),
        sums={name: _pair(metric) for name, metric in metrics.items()},
        maxima=maxima,
        trust={} if out.trust_T is None else _trust(out.trust_T, packed, of.shown),
    )
    return out.loss, out.denominator.int(), part


def _trust(trust_T: Tensor, packed: Packed, shown: frozenset[int]) -> dict[int, list[float]]:
    """Return the gate's weights of the tokens that the student wrote, by index of the rollout."""
    indices, microbatch = packed
    if shown.isdisjoint(indices):
        return {}
    weights, written = trust_T.tolist(), Regions.of(microbatch.streams).on_policy_T.tolist()
    bounds = microbatch.cu_seqlens.tolist()
    return {
        index: [weights[row] for row in range(bounds[place], bounds[place + 1]) if written[row]]
        for place, index in enumerate(indices)
        if index in shown
    }


def _parity(logprob_T: Tensor, tokens: TokenStreams) -> tuple[dict[str, Metric], dict[str, float]]:
    """Return (means, maxima) of the difference between the log-probabilities of trainer and sampling engine."""
    on_policy_T = Regions.of(tokens).on_policy_T
    # After the first update of a batch the current student is no longer the one that generated it.
    trainer_T = logprob_T if tokens.old_logprob_T is None else tokens.old_logprob_T
    gap_T = (trainer_T - tokens.rollout_logprob_T).abs()
    largest = float(torch.where(on_policy_T, gap_T, 0.0).max())
    return {"parity/logprob_abs_diff_mean": mean_over(gap_T, on_policy_T)}, {"parity/logprob_abs_diff_max": largest}


def _logprobs(student_T: Tensor, tokens: TokenStreams, needs: Needs) -> dict[str, Metric]:
    """Return the mean log-probability of the response tokens by each model, and how many the teacher excludes."""
    regions = Regions.of(tokens)
    response_T = regions.on_policy_T | regions.guidance_T
    teacher_T = tokens.teacher_logprob_T if needs.teacher else None
    found = {"student": student_T, "teacher": teacher_T, "reference": tokens.reference_logprob_T}
    means = {
        f"{who}/logprob_mean": mean_over(logprob_T, response_T & (logprob_T > -torch.inf))
        for who, logprob_T in found.items()
        if logprob_T is not None
    }
    if teacher_T is not None:
        means["teacher/excluded_frac"] = mean_over((teacher_T == -torch.inf).double(), response_T)
    return means


def mean_logprobs(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the mean log-probability of the response tokens by model; -inf for a teacher that excludes most."""
    means = {
        who: metrics[name] for who in ("student", "teacher", "reference") if (name := f"{who}/logprob_mean") in metrics
    }
    return means | ({"teacher": -math.inf} if metrics.get("teacher/excluded_frac", 0.0) > 0.5 else {})


def _pair(metric: Metric) -> tuple[float, float]:
    return float(metric.total), float(metric.count)
