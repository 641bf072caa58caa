"""The objective of a run: that of its flags, and what its metrics get from the run's teachers."""

from __future__ import annotations

from dataclasses import replace

from megatron_tropd.config import TrainConfig
from megatron_tropd.objectives.base import Objective
from megatron_tropd.objectives.methods import make_objective
from megatron_tropd.setup.stored_scores import holds_entropies
from megatron_tropd.teacher.several.shares import Shares


def objective_of(config: TrainConfig) -> Objective:
    """Return the objective of ``config``, which asks for the teacher's entropy where every teacher gives it.

    Raises:
        ValueError: a setting of the objective cannot be used.
    """
    settings = replace(config.objective_settings, log_teacher_entropy=_all_give_entropy(config))
    return make_objective(config.objective.objective, settings)


def _all_give_entropy(config: TrainConfig) -> bool:
    """Whether each teacher gives its entropy over the whole vocabulary, and none is mixed with another.

    A Megatron model's head computes it anyway, in the sum that it needs for the log-probabilities.  SGLang has no such
    number, and that of the top-k would be another one.
    """
    if Shares(config.teachers).mixed:
        return False
    return all(_gives_entropy(own) for own in config.by_teacher.values())


def _gives_entropy(config: TrainConfig) -> bool:
    placement = config.teacher.teacher_placement
    return holds_entropies(config) if placement == "file" else placement != "server"
