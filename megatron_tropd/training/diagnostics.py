"""Measure the gradient of each region of tokens: its norm, and its cosine with the exact reverse-KL gradient.

Each region takes one pass over the rollouts of the first update, with the objective's loss inside the region and 0
outside.  The denominator stays that of the whole update, so the gradients of the regions add up to the update's.  The
gradient compared with is that of the full-vocabulary reverse KL on the student's tokens.
"""

from __future__ import annotations

import math

from megatron_tropd.config import TrainConfig
from megatron_tropd.data.packing import PackPlan
from megatron_tropd.objectives.base import Objective
from megatron_tropd.objectives.diagnostics import GRADIENT_REGIONS, only_region
from megatron_tropd.objectives.methods import make_objective
from megatron_tropd.objectives.settings import ObjectiveSettings
from megatron_tropd.training.step import Batch, forward_backward, pack_update
from megatron_tropd.training.student import Gradient, Student


def diagnostics_due(config: TrainConfig, step: int) -> bool:
    """Return whether to measure ``step`` (from 0): every --gradient-diagnostics-interval steps, the first included."""
    interval = config.logging.gradient_diagnostics_interval
    return bool(interval) and step % interval == 0


def gradient_diagnostics(student: Student, objective: Objective, batch: Batch, plan: PackPlan) -> dict[str, float]:
    """Return every region's gradient norm, and its cosine with the exact reverse-KL gradient, by metric name.

    Costs five forward and backward passes and one more copy of the gradient; without a teacher there is no reverse
    KL, and it costs four passes and no copy.  A cosine with a gradient of zero is left out; values that are not
    finite are reported as they are.  The gradients are zero afterwards.  Collective over the world.
    """

    def gradient(objective: Objective) -> tuple[Gradient, float]:
        forward_backward(student, objective, batch, pack_update(student, objective, batch, plan))
        parts = student.gradient()
        return parts, math.sqrt(student.inner_product(parts, parts))

    metrics, exact, exact_norm = {}, None, 0.0
    if objective.needs.teacher:
        parts, exact_norm = gradient(make_objective("full_rkl", ObjectiveSettings(guidance_beta=0.0)))
        exact = [[part.clone() for part in of_optimizer] for of_optimizer in parts]
        metrics["gradient/norm_reverse_kl"] = exact_norm
    for region in GRADIENT_REGIONS:
        parts, norm = gradient(only_region(objective, region))
        metrics[f"gradient/norm_{region}"] = norm
        if exact and norm and exact_norm:
            metrics[f"gradient/cosine_{region}"] = student.inner_product(parts, exact) / (norm * exact_norm)
    student.zero_grad()
    return metrics
