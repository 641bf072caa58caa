"""Make what scores the rollouts of a run: teachers, where --teacher-placement puts them, and the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import torch

from megatron_tropd.checkpoints.run_record import RunRecord
from megatron_tropd.objectives.topk_use import request_of
from megatron_tropd.parallel.groups import ModelGroups, teacher_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.roles import job_of_environment
from megatron_tropd.setup.model_specs import TeacherSpec
from megatron_tropd.setup.models import make_frozen
from megatron_tropd.setup.run_spec import RunSpec
from megatron_tropd.setup.teacher_servers import teacher_server_model, teacher_server_settings
from megatron_tropd.teacher.colocated import ColocatedScorer
from megatron_tropd.teacher.dedicated.scorer import DedicatedScorer
from megatron_tropd.teacher.kept_scores import KeptScores, ScoreStore
from megatron_tropd.teacher.scorer import Scorer
from megatron_tropd.teacher.server.scorer import ServerScorer
from megatron_tropd.teacher.several.scorer import SeveralTeachers
from megatron_tropd.teacher.several.shares import Shares
from megatron_tropd.teacher.stored.files import ScoreFiles
from megatron_tropd.teacher.stored.scorer import StoredScorer
from megatron_tropd.training.diagnostics import diagnostics_due
from megatron_tropd.training.stream import Scoring
from megatron_tropd.training.student import params_dtype
from megatron_tropd.types import ScoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where scorers are made."""

    spec: RunSpec
    made: dict[ParallelLayout, ModelGroups] = field(default_factory=dict)
    """Groups on the student's ranks, by layout: models of one layout share them."""

    def groups_of(self, layout: ParallelLayout) -> ModelGroups:
        """Groups of a frozen model on the student's ranks.  Collective over the world."""
        if layout not in self.made:
            self.made[layout] = teacher_groups(layout, timeout_s=self.spec.config.parallel.distributed_timeout_s)
        return self.made[layout]


def _colocated(place: Place, teacher: TeacherSpec) -> Scorer:
    groups, offload = place.groups_of(teacher.layout), teacher.config.teacher.teacher_offload
    return ColocatedScorer(make_frozen(place.spec, teacher.model, groups, "teacher", offload=offload))


def _dedicated(place: Place, teacher: TeacherSpec) -> Scorer:
    spec, arch, layout = place.spec, teacher.model.arch, teacher.layout
    return DedicatedScorer(
        job_of_environment(spec.roles),
        teacher.role,
        layout,
        hidden_like=torch.empty(0, arch.hidden_size, dtype=params_dtype(spec.config)),
        padded_vocab_size=layout.padded_vocab_size(arch.vocab_size),
        vocab_size=spec.tokens.common_vocab_size,
        timeout_s=spec.config.parallel.distributed_timeout_s,
    )


def _server(place: Place, teacher: TeacherSpec) -> Scorer:
    return ServerScorer(
        teacher_server_settings(teacher, place.spec.gpus.of_teacher(teacher.role)),
        teacher_server_model(teacher, place.spec.tokens.common_vocab_size),
        agreement=place.spec.config.parity_limit,
    )


def _file(place: Place, teacher: TeacherSpec) -> Scorer:
    return StoredScorer(ScoreFiles(teacher.config.teacher.teacher_scores))


PLACEMENTS: dict[str, Callable[[Place, TeacherSpec], Scorer]] = {
    "colocated": _colocated,
    "dedicated": _dedicated,
    "server": _server,
    "file": _file,
}
"""Maker of a teacher by --teacher-placement.  Collective over the student's ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorers:
    """What scores the rollouts of a run; None where the objective needs none."""

    teacher: Scoring | None
    """The only one, or all of several as one."""
    reference: Scoring | None
    by_role: Mapping[str, Scorer]
    """Each model's own, by its role."""


def _together(spec: RunSpec, by_role: Mapping[str, Scorer]) -> Scorer:
    """Return the run's teachers as one scorer."""
    shares, prompts = Shares(spec.config.teachers), spec.data.prompts.by_uid
    # One on the trainer's ranks works when it is asked; those elsewhere work meanwhile.
    order = sorted(spec.config.teachers, key=lambda one: one.settings.teacher_placement != "colocated")
    parts = {one.name: by_role[one.role] for one in order}
    return SeveralTeachers(parts, shares, lambda uid: prompts[uid].domain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeping:
    """How the scores of unfinished batches are kept."""

    store: ScoreStore
    record: RunRecord
    """Of this launch: it has the digests of the models, and the code."""

    def around(self, scorer: Scorer, role: str, placement: str, spec: RunSpec) -> Scorer:
        """Return ``scorer`` with its scores kept; itself if its scores are in files anyway."""
        if placement == "file":
            return scorer
        flags = sorted(spec.config.by_teacher[role].teacher_sglang_flags.items()) if placement == "server" else []
        told = (
            role, placement, self.record.models[role].digest, self.record.code, str(params_dtype(spec.config)),
            spec.tokens.common_vocab_size, flags,
        )  # fmt: skip
        kept = KeptScores(
            scorer, self.store, who=role, identity=repr(told), whole_batches=placement == "colocated",
            as_they_finish=placement == "server",
        )  # fmt: skip
        if isinstance(scorer, ServerScorer):
            scorer.on_scored = kept.keep
        return kept


def make_scorers(spec: RunSpec, student: ModelGroups, on_failure: ExitStack, keeping: Keeping | None = None) -> Scorers:
    """Make the scorers that the objective needs, and have ``on_failure`` close each; collective over the world.

    The reference is on the student's ranks: it is as small as the student.  ``keeping``: None to keep no scores.
    """
    models, config, needs = spec.models, spec.config, spec.objective.needs
    place = Place(spec=spec)

    def teacher_wants(step: int) -> ScoreRequest:
        want = request_of(needs, seed=config.training.seed, step=step)
        return replace(want, hidden=want.hidden or diagnostics_due(config, step))

    by_role: dict[str, Scorer] = {}
    teacher = reference = None
    for each in models.teachers:
        scorer = PLACEMENTS[each.placement](place, each)
        on_failure.callback(scorer.close)
        by_role[each.role] = keeping.around(scorer, each.role, each.placement, spec) if keeping else scorer
    if by_role:
        whole = _together(spec, by_role) if config.teachers else by_role["teacher"]
        teacher = Scoring(scorer=whole, want=teacher_wants)
    if models.reference and models.reference_layout:
        layout = models.reference_layout
        same_groups = models.reference is models.student and student.layout.cp == 1
        groups = replace(student, layout=layout) if same_groups else place.groups_of(layout)
        model = make_frozen(spec, models.reference, groups, "reference", offload=config.teacher.teacher_offload)
        scorer = ColocatedScorer(model)
        by_role["reference"] = keeping.around(scorer, "reference", "colocated", spec) if keeping else scorer
        reference = Scoring(scorer=by_role["reference"], want=lambda _: ScoreRequest())
    return Scorers(teacher=teacher, reference=reference, by_role=by_role)
