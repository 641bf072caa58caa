"""One forward and backward pass over the rollouts of an update, through Megatron's pipeline schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_tropd import rng
from megatron_tropd.data.packing import BatchPlan, PackPlan, pack
from megatron_tropd.data.streams import SampleScores
from megatron_tropd.models.build import forward_hidden
from megatron_tropd.models.context import held_part
from megatron_tropd.objectives.base import Objective, Regions, mean_over
from megatron_tropd.objectives.checks import check_streams
from megatron_tropd.ops.vocab_parallel import head_loss
from megatron_tropd.parallel import determinism, host_copies, platform
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.parallel.fail_together import on_all_ranks
from megatron_tropd.training.student import Student
from megatron_tropd.training.token_numbers import PendingTokens
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
    """Indices of the rollouts whose tokens are shown to people, with what the loss read of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Rollouts packed into a micro-batch, on the CPU: the part of it that this rank holds."""

    indices: tuple[int, ...]
    """The rollouts, in packing order."""
    microbatch: Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedUpdate:
    """The micro-batches of an update on this rank."""

    plan: PackPlan
    microbatches: tuple[Packed, ...]


def pack_update(student: Student, objective: Objective, batch: Batch, plan: PackPlan) -> PackedUpdate:
    """Pack this replica's micro-batches, with the gate's coins; sample scores on the last stage only."""
    coins = rng.key(batch.seed, rng.Stream.GATE, batch.context.step)

    def one(indices: tuple[int, ...]) -> Packed:
        packed = pack(
            [batch.rollouts[i] for i in indices],
            [batch.sample_scores[i] for i in indices] if student.groups.is_last_stage else None,
            num_tokens=plan.num_tokens,
            sequence_multiple_of=plan.sequence_multiple_of,
            needs=objective.needs,
            teacher_hidden=batch.teacher_hidden,
        )
        packed = held_part(packed, student.groups)
        streams = packed.streams
        uniform_T = rng.uniform(coins, streams.sample_uid_T, streams.label_position_T)
        packed = replace(packed, streams=replace(streams, uniform_T=uniform_T))
        return Packed(indices=indices, microbatch=packed)

    return PackedUpdate(plan=plan, microbatches=tuple(map(one, plan.microbatches[student.groups.coords.dp])))


def pack_batch(student: Student, objective: Objective, batch: Batch, plan: BatchPlan) -> list[PackedUpdate]:
    """Pack all updates of a batch, and check every stream against the objective's needs, before any gradient is
    computed; collective over the world.

    Raises:
        ValueError: on every rank; the message names the prompt.
    """

    def make() -> list[PackedUpdate]:
        updates = [pack_update(student, objective, batch, minibatch) for minibatch in plan.minibatches]
        if student.groups.reports:
            for packed in (packed for update in updates for packed in update.microbatches):
                check_streams(packed.microbatch.streams, objective.needs)
        return updates

    return on_all_ranks(make, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassResult:
    """What a forward and backward pass over an update found."""

    sums: StepSums
    """Over the rollouts of all ranks, the same on every rank."""
    tokens: dict[int, Tensor]
    """By index of a rollout in ``Batch.shown``: the table of its tokens on this rank (``token_numbers.py``)."""


def forward_backward(student: Student, objective: Objective, batch: Batch, update: PackedUpdate) -> PassResult:
    """Compute the gradient of the token-mean loss over ``update`` into the student; collective over the world.

    Division by the global token count happens once, in Megatron's ``finalize_model_grads``.  The host runs ahead of
    the device; it waits at the end, for the numbers to report.
    """
    student.zero_grad()
    with determinism.deterministic_kernels(student.model.config.deterministic_mode):
        layout = student.groups.layout
        pending: list[_PendingSums] = get_forward_backward_func(layout.pp, layout.vpp)(
            forward_step_func=partial(_forward_step, student=student, objective=objective, of=batch),
            data_iterator=[iter(update.microbatches) for _ in student.ddp],
            model=student.ddp,
            num_microbatches=update.plan.num_microbatches,
            seq_length=update.plan.num_tokens,
            micro_batch_size=1,
            forward_only=False,
        )
    mine = pending if student.groups.reports else []
    everyone = gather_objects([part.read() for part in mine])
    return PassResult(
        sums=StepSums.of([part for rank_parts in everyone for part in rank_parts]),
        tokens={index: table for part in mine if part.tokens for index, table in part.tokens.read().items()},
    )


def _forward_step(
    microbatches: Iterator[Packed], model: torch.nn.Module, *, student: Student, objective: Objective, of: Batch
) -> tuple[Tensor, Any]:
    packed = next(microbatches)
    student.microbatches += 1
    # Pinned only now: the micro-batches of a whole batch are too much for memory that cannot be swapped.
    microbatch = host_copies.pinned(packed.microbatch).to(platform.device())
    hidden = forward_hidden(model, microbatch)
    return hidden, partial(_loss, packed=packed, microbatch=microbatch, student=student, objective=objective, of=of)


def _loss(
    hidden: Tensor, *, packed: Packed, microbatch: Microbatch, student: Student, objective: Objective, of: Batch
) -> tuple[Tensor, Tensor, _PendingSums]:
    """Return (loss sum, number of tokens, sums to report), as Megatron's per-token loss requires."""
    tokens = microbatch.streams
    out = head_loss(
        hidden,
        student.head_weight(),
        tokens,
        student.shard,
        objective,
        of.context,
        sequence_parallel=student.model.config.sequence_parallel,
        settings=student.head(objective.needs),
        teacher_weight=of.teacher_weight,
        rows=microbatch.rows.loss,
    )
    parity, maxima = _parity(out.logprob_T, tokens) if objective.needs.rollouts else ({}, {})
    pending = _PendingSums(
        loss_sum=out.loss.detach(),
        denominator=out.denominator,
        sums={**out.metrics, **parity, **_logprobs(out.logprob_T, tokens, objective.needs)},
        maxima=maxima,
        tokens=PendingTokens.of(packed.indices, of.shown, packed.microbatch, objective.needs, out),
    )
    return out.loss, out.denominator.int(), pending


@dataclass(frozen=True, slots=True, kw_only=True)
class _PendingSums:
    """The sums of a micro-batch that the device may not have computed yet; every tensor is a scalar there."""

    loss_sum: Tensor
    denominator: Tensor
    sums: dict[str, Metric]
    maxima: dict[str, Tensor]
    tokens: PendingTokens | None
    """None where no rollout of the micro-batch is shown."""

    def read(self) -> StepSums:
        """Wait for the device and return the sums."""
        scalars = [self.loss_sum, self.denominator, *self.maxima.values()]
        scalars += [part for metric in self.sums.values() for part in (metric.total, metric.count)]
        loss_sum, denominator, *rest = torch.stack([scalar.double() for scalar in scalars]).tolist()
        maxima, pairs = rest[: len(self.maxima)], rest[len(self.maxima) :]
        return StepSums(
            loss_sum=loss_sum,
            denominator=int(denominator),
            sums=dict(zip(self.sums, zip(pairs[::2], pairs[1::2], strict=True), strict=True)),
            maxima=dict(zip(self.maxima, maxima, strict=True)),
        )


def _parity(logprob_T: Tensor, tokens: TokenStreams) -> tuple[dict[str, Metric], dict[str, Tensor]]:
    """Return (means, maxima) of the difference between the log-probabilities of trainer and sampling engine."""
    on_policy_T = Regions.of(tokens).on_policy_T
    # After the first update of a batch the current student is no longer the one that generated it.
    trainer_T = logprob_T if tokens.old_logprob_T is None else tokens.old_logprob_T
    gap_T = (trainer_T - tokens.rollout_logprob_T).abs()
    largest = torch.where(on_policy_T, gap_T, 0.0).max()
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
