"""Score a rollout batch with the student as it is before the first update, in a forward pass without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tropd.data.packing import BatchPlan
from megatron_tropd.ops.vocab_parallel import quantile_threshold, student_token_stats
from megatron_tropd.parallel import platform
from megatron_tropd.teacher.scoring import score_rollouts
from megatron_tropd.training.student import Student
from megatron_tropd.types import Microbatch, Needs, Rollout, TeacherScores


def old_policy_scores(
    student: Student, rollouts: Sequence[Rollout], plan: BatchPlan, *, vocab_size: int | None = None
) -> dict[int, TeacherScores]:
    """Return the log-probability of every response token and the entropy of every written token, by rollout index.

    The pass runs over the micro-batches of the updates themselves, so the scores are already on the ranks that need
    them: every rank of the last stage of the replica that owns a rollout.  Other ranks get {}.  The log-probability
    is 0 for tokens that no loss reads (the prefix in the 2nd, 3rd, ... sample of a prompt).  Collective over the world.

    Probabilities are over the first ``vocab_size`` ids; by default over the common vocabulary of all models.
    """
    shard = student.shard if vocab_size is None else replace(student.shard, vocab_size=vocab_size)

    def head(hidden: Tensor, batch: Microbatch) -> TeacherScores:
        stats = student_token_stats(
            hidden,
            student.head_weight(),
            batch.streams,
            shard,
            sequence_parallel=student.model.config.sequence_parallel,
            settings=student.head(Needs()),
            rows=batch.rows.loss,
        )
        assert stats.entropy_T is not None, "the head always has it"
        return TeacherScores(logprob=stats.logprob_T[batch.rows.response], entropy=stats.entropy_T[batch.rows.written])

    found: dict[int, TeacherScores] = {}
    for minibatch in plan.minibatches:
        found.update(score_rollouts(student.model, student.groups, rollouts, minibatch, head))
    return found


def entropy_threshold(student: Student, before: Mapping[int, TeacherScores], share: float) -> float:
    """Return the entropy that the ``share`` of the batch's written tokens with the highest entropy reaches.

    It is exact and the same in every layout (see :func:`quantile_threshold`).  Collective over the world.

    Args:
        student: its groups tell which ranks report: one of each replica's last stage.
        before: result of :func:`old_policy_scores`.
        share: in (0, 1].
    """
    reports = student.groups.reports_replica
    mine = [scores.entropy for scores in before.values() if reports and scores.entropy is not None]
    return quantile_threshold(torch.cat([torch.empty(0), *mine]).to(platform.device()), share)
