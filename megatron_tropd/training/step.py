"""One forward and backward pass over a step's rollouts, through Megatron's pipeline schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_tropd import rng
from megatron_tropd.data.packing import PackPlan, pack
from megatron_tropd.models.build import forward_hidden
from megatron_tropd.objectives.base import Objective, Regions, mean_over
from megatron_tropd.ops.vocab_parallel import head_loss
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.training.student import Student
from megatron_tropd.types import Metric, Microbatch, Rollout, StepContext, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a pass over the global batch gave; the same on every rank."""

    loss: float
    """Sum of token losses / denominator."""
    num_tokens: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """One micro-batch's (or one rank's) share of a StepResult, still as sums."""

    loss_sum: float
    num_tokens: int
    sums: dict[str, tuple[float, float]]
    maxima: dict[str, float]


def forward_backward(
    student: Student,
    objective: Objective,
    rollouts: Sequence[Rollout],
    scores: dict[int, TeacherScores],
    plan: PackPlan,
    *,
    seed: int,
    context: StepContext,
) -> StepResult:
    """Leave the gradient of the token-mean loss in the student; collective over the world.

    ``scores`` are those of the rollouts this rank's data-parallel replica owns (read on its last stage
    only).  Division by the global token count happens once, in Megatron's ``finalize_model_grads``.
    """
    is_last = student.groups.is_last_stage

    coins = rng.key(seed, rng.Stream.GATE, context.step)

    def microbatches() -> Iterator[Microbatch]:
        for indices in plan.microbatches[student.groups.coords.dp]:
            chosen = [rollouts[i] for i in indices]
            payload = [scores[i] for i in indices] if is_last else None
            batch = pack(chosen, payload, num_tokens=plan.num_tokens, want=objective.needs.score)
            streams = batch.streams
            yield replace(
                batch,
                streams=replace(streams, uniform_T=rng.uniform(coins, streams.sample_uid_T, streams.label_position_T)),
            )

    student.zero_grad()
    parts: list[_Part] = get_forward_backward_func(student.groups.layout.pp, None)(
        forward_step_func=partial(_forward_step, student=student, objective=objective, context=context),
        data_iterator=microbatches(),
        model=[student.ddp],
        num_microbatches=plan.num_microbatches,
        seq_length=plan.num_tokens,
        micro_batch_size=1,
        forward_only=False,
    )
    # TP ranks of the last stage hold equal numbers: one of them speaks for its replica.
    speaks = is_last and student.groups.coords.tp == 0
    return _combine([part for rank_parts in gather_objects(parts if speaks else []) for part in rank_parts])


def _forward_step(
    batches: Iterator[Microbatch], model: torch.nn.Module, *, student: Student, objective: Objective,
    context: StepContext,
) -> tuple[Tensor, Any]:  # fmt: skip
    batch = next(batches).to(platform.device())
    hidden = forward_hidden(model, batch)
    return hidden, partial(_loss, batch=batch, student=student, objective=objective, context=context)


def _loss(
    hidden: Tensor, *, batch: Microbatch, student: Student, objective: Objective, context: StepContext
) -> tuple[Tensor, Tensor, _Part]:
    """Megatron's per-token-loss contract: (loss sum, number of tokens, what to keep)."""
    tokens = batch.streams
    out = head_loss(
        hidden,
        student.model.lm_head_weight(),
        tokens,
        student.shard,
        objective,
        context,
        sequence_parallel=student.model.config.sequence_parallel,
    )
    on_policy_T = Regions.of(tokens).on_policy_T
    gap_T = (out.logprob_T - tokens.rollout_logprob_T).abs()
    metrics = {**out.metrics, "parity/logprob_abs_diff_mean": mean_over(gap_T, on_policy_T)}
    part = _Part(
        loss_sum=float(out.loss.detach()),
        num_tokens=int(out.denominator),
        sums={name: _pair(metric) for name, metric in metrics.items()},
        maxima={"parity/logprob_abs_diff_max": float(torch.where(on_policy_T, gap_T, 0.0).max())},
    )
    return out.loss, out.denominator.int(), part


def _pair(metric: Metric) -> tuple[float, float]:
    return float(metric.total), float(metric.count)


def _combine(parts: Sequence[_Part]) -> StepResult:
    num_tokens = sum(part.num_tokens for part in parts)
    metrics: dict[str, float] = {}
    for name in {name for part in parts for name in part.sums}:
        pairs = [part.sums[name] for part in parts if name in part.sums]
        count = math.fsum(count for _, count in pairs)
        if count:
            metrics[name] = math.fsum(total for total, _ in pairs) / count
    for name in {name for part in parts for name in part.maxima}:
        metrics[name] = max(part.maxima[name] for part in parts)
    loss = math.fsum(part.loss_sum for part in parts) if all(math.isfinite(p.loss_sum) for p in parts) else math.nan
    return StepResult(loss=loss / max(num_tokens, 1), num_tokens=num_tokens, metrics=dict(sorted(metrics.items())))
