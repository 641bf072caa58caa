"""Split a batch of rollouts into updates and score it, all before the first update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_tropd.data.advantages import Advantages, group_advantages
from megatron_tropd.data.packing import BatchPlan, plan_batch
from megatron_tropd.data.streams import SampleScores
from megatron_tropd.teacher.scorer import Destination
from megatron_tropd.training.old_policy import entropy_threshold, old_policy_scores
from megatron_tropd.training.run import Run
from megatron_tropd.training.step import Batch
from megatron_tropd.types import Rollout, StepContext, TeacherScores


def plan_updates(run: Run, rollouts: Sequence[Rollout]) -> BatchPlan:
    """Assign every rollout to a data-parallel replica and to one of the --num-minibatches updates."""
    layout, training = run.student.groups.layout, run.config.training
    return plan_batch(
        rollouts,
        num_minibatches=training.num_minibatches,
        data_parallel_size=layout.dp,
        max_tokens=training.max_tokens_per_microbatch,
        multiple_of=run.student.token_multiple,
        sequence_multiple_of=run.student.sequence_multiple,
        num_microbatches_multiple_of=run.student.microbatch_multiple,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch:
    """A scored batch, ready for its updates, and the metrics of its rewards and entropies."""

    batch: Batch
    metrics: dict[str, float]


def score_batch(run: Run, rollouts: Sequence[Rollout], plan: BatchPlan, step: int) -> ScoredBatch:
    """Score the rollouts with what the objective needs: teacher, reference, reward function, old student.

    Collective over the world.
    """
    needs, student = run.objective.needs, run.student
    destination, by_index = Destination(groups=student.groups, owners=plan.owners), dict(enumerate(rollouts))
    scores: Mapping[int, TeacherScores] = {}
    references: Mapping[int, TeacherScores] = {}
    before: Mapping[int, TeacherScores] = {}
    advantages: Advantages | None = None
    metrics: dict[str, float] = {}
    if run.teacher is not None:
        scores = run.teacher.scorer.scores(step, by_index, run.teacher.want(step), destination)
    if run.reference is not None:
        references = run.reference.scorer.scores(step, by_index, run.reference.want(step), destination)
    if run.rewarder is not None:
        advantages, metrics = _advantages(run, rollouts)
    threshold = None
    if needs.old_policy:
        before = old_policy_scores(student, rollouts, plan)
    if needs.entropy_quantile is not None:
        threshold = entropy_threshold(student, before, needs.entropy_quantile)
        if math.isfinite(threshold):  # inf where the student wrote no token of the batch
            metrics["student/entropy_threshold"] = threshold

    def scores_of(index: int) -> SampleScores:
        reference, old = references.get(index), before.get(index)
        return SampleScores(
            teacher=scores.get(index),
            reference_logprob=reference.logprob if reference else None,
            old_logprob=old.logprob if old else None,
            old_entropy=old.entropy if old else None,
            advantage=advantages.values[index] if advantages else None,
        )

    batch = Batch(
        rollouts=rollouts,
        sample_scores={
            index: scores_of(index) for index, owner in plan.owners.items() if owner == student.groups.coords.dp
        },
        context=StepContext(step=step, num_steps=run.config.training.train_iters, entropy_threshold=threshold),
        seed=run.config.training.seed,
        teacher_hidden=run.teacher.scorer.hidden_like if run.teacher else None,
        teacher_weight=run.teacher_weight,
        shown=frozenset(range(run.logger.rollouts_shown(step + 1))),
    )
    return ScoredBatch(batch=batch, metrics=metrics)


def _advantages(run: Run, rollouts: Sequence[Rollout]) -> tuple[Advantages, dict[str, float]]:
    assert run.rewarder is not None
    settings = run.config.reward
    rewards = run.rewarder.rewards(rollouts)
    advantages = group_advantages(
        rewards,
        [rollout.prompt_uid for rollout in rollouts],
        baseline=settings.advantage_baseline,
        divide_by_std=settings.advantage_std,
    )
    return advantages, {
        "reward/mean": sum(rewards) / len(rewards),
        "reward/abs_max": max(map(abs, rewards)),
        "reward/flat_groups_frac": advantages.num_flat / advantages.num_groups,
    }
