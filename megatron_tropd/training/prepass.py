"""The student's own numbers before the first update on a rollout batch, from a forward pass without gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.data.packing import BatchPlan
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.teacher.scoring import Scorer
from megatron_tropd.training.student import Student
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


def prepass(student: Student, rollouts: Sequence[Rollout], plan: BatchPlan) -> dict[int, TeacherScores]:
    """Log-probability and entropy of every response token, by rollout index, where the rollout is trained on.

    One pass over the micro-batches of the updates themselves, so the numbers are already on the ranks that need
    them: every rank of the last stage of the replica that owns a rollout; {} elsewhere.  Collective.
    """
    scorer = Scorer(model=student.model, groups=student.groups, shard=student.shard)
    found: dict[int, TeacherScores] = {}
    for minibatch in plan.minibatches:
        found.update(scorer.forward(rollouts, minibatch, ScoreRequest(entropy=True)))
    return found


def entropy_threshold(
    student: Student, rollouts: Sequence[Rollout], entropies: Mapping[int, Tensor], share: float
) -> float:
    """The entropy that the ``share`` of the batch's written tokens with the highest entropy reach: the k-th largest
    with k = ceil(share * number of tokens).  Exact, the same on every rank; collective over the world.

    Args:
        student: tells which ranks speak: the first of the last stage's, for each replica.
        rollouts: of the batch.
        entropies: by rollout index, of all response tokens.
        share: in (0, 1].
    """
    speaks = student.groups.is_last_stage and student.groups.coords.tp == 0
    mine = [entropies[index][rollouts[index].guidance_len :] for index in sorted(entropies)] if speaks else []
    values = np.concatenate(gather_objects(torch.cat(mine).numpy() if mine else np.empty(0, np.float32)))
    if not values.size or not np.isfinite(values).all():  # the guard ends the step; there is nothing to choose
        return math.inf
    keep = max(1, math.ceil(share * values.size))
    return float(np.partition(values, values.size - keep)[values.size - keep])
