"""Make what scores the rollouts of a run: the teacher, where --teacher-placement puts it, and the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from megatron_tropd.objectives.topk_use import request_of
from megatron_tropd.parallel.groups import ModelGroups, teacher_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.roles import job_of_environment
from megatron_tropd.setup.models import make_frozen
from megatron_tropd.setup.run_spec import TEACHER_ROLE, RunSpec
from megatron_tropd.setup.teacher_servers import teacher_server_model, teacher_server_settings
from megatron_tropd.teacher.colocated import ColocatedScorer
from megatron_tropd.teacher.dedicated.scorer import DedicatedScorer
from megatron_tropd.teacher.scorer import Scorer
from megatron_tropd.teacher.server.scorer import ServerScorer
from megatron_tropd.teacher.stored.files import ScoreFiles
from megatron_tropd.teacher.stored.scorer import StoredScorer
from megatron_tropd.training.diagnostics import diagnostics_due
from megatron_tropd.training.stream import Scoring
from megatron_tropd.training.student import params_dtype
from megatron_tropd.types import ScoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What a teacher is made from."""

    spec: RunSpec
    student: ModelGroups
    made: dict[ParallelLayout, ModelGroups] = field(default_factory=dict)
    """Groups on the student's ranks, by layout: models of one layout share them."""

    def groups_of(self, layout: ParallelLayout) -> ModelGroups:
        """Groups of a frozen model on the student's ranks.  Collective over the world."""
        if layout not in self.made:
            self.made[layout] = teacher_groups(layout, timeout_s=self.spec.config.parallel.distributed_timeout_s)
        return self.made[layout]


def _colocated(place: Place) -> Scorer:
    models = place.spec.models
    assert models.teacher and models.teacher_layout
    groups = place.groups_of(models.teacher_layout)
    return ColocatedScorer(make_frozen(place.spec, models.teacher, groups, "teacher"))


def _dedicated(place: Place) -> Scorer:
    spec, models = place.spec, place.spec.models
    assert models.teacher and models.teacher_layout
    arch, layout = models.teacher.arch, models.teacher_layout
    return DedicatedScorer(
        job_of_environment(spec.roles),
        TEACHER_ROLE,
        layout,
        hidden_like=torch.empty(0, arch.hidden_size, dtype=params_dtype(spec.config)),
        padded_vocab_size=layout.padded_vocab_size(arch.vocab_size),
        vocab_size=spec.tokens.common_vocab_size,
        timeout_s=spec.config.parallel.distributed_timeout_s,
    )


def _server(place: Place) -> Scorer:
    spec, config = place.spec, place.spec.config
    assert spec.models.teacher
    return ServerScorer(
        teacher_server_settings(config, spec.models.teacher),
        teacher_server_model(config, spec.models.teacher, spec.tokens.common_vocab_size),
        agreement=config.parity_limit,
    )


def _file(place: Place) -> Scorer:
    return StoredScorer(ScoreFiles(place.spec.config.teacher.teacher_scores))


PLACEMENTS: dict[str, Callable[[Place], Scorer]] = {
    "colocated": _colocated,
    "dedicated": _dedicated,
    "server": _server,
    "file": _file,
}
"""Maker of the teacher by --teacher-placement.  Collective over the student's ranks."""


def make_scorers(spec: RunSpec, student: ModelGroups) -> tuple[Scoring | None, Scoring | None]:
    """Make (teacher, reference), each only if the objective needs it, else None; collective over the world.

    The reference is on the student's ranks: it is as small as the student.
    """
    models, config, needs = spec.models, spec.config, spec.objective.needs
    place = Place(spec=spec, student=student)

    def teacher_wants(step: int) -> ScoreRequest:
        want = request_of(needs, seed=config.training.seed, step=step)
        return replace(want, hidden=want.hidden or diagnostics_due(config, step))

    teacher = reference = None
    if models.teacher:
        teacher = Scoring(scorer=PLACEMENTS[config.teacher.teacher_placement](place), want=teacher_wants)
    if models.reference and models.reference_layout:
        layout = models.reference_layout
        same_groups = models.reference is models.student and student.layout.cp == 1
        groups = replace(student, layout=layout) if same_groups else place.groups_of(layout)
        model = make_frozen(spec, models.reference, groups, "reference")
        reference = Scoring(scorer=ColocatedScorer(model), want=lambda _: ScoreRequest())
    return teacher, reference
