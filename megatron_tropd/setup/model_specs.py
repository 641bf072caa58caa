"""Find the models of a run: where each is stored, its architecture and its parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_tropd.checkpoints.directory import find_checkpoint, hf_directory, read_metadata
from megatron_tropd.checkpoints.metadata import check_architecture
from megatron_tropd.config import TrainConfig
from megatron_tropd.errors import text_of
from megatron_tropd.hub import MODEL_CONFIG_FILES, MODEL_FILES, Resolved, is_hub_name, resolve
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.setup.problems import Problems
from megatron_tropd.training.megatron_configs import megatron_errors
from megatron_tropd.training.student import training_errors
from megatron_tropd.types import Needs
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Where a model's config, tokenizer and weights are and come from, and its architecture."""

    hf_dir: Path
    """Directory of config and tokenizer, and of the weights unless ``megatron_dir`` is given."""
    megatron_dir: Path | None
    arch: Architecture
    hf_name: str
    """Value of the flag for the HF directory; a name of the Hub with its commit."""
    source: str
    """Where the weights come from on the Hub, ``owner/name@commit``; empty where that is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec:
    """The teacher, or one of several."""

    role: str
    """Key of ``TrainConfig.by_teacher``: what its ranks, its record and its directory are called."""
    config: TrainConfig
    """The run's, with the settings of this teacher."""
    model: ModelSpec
    layout: ParallelLayout

    @property
    def placement(self) -> str:
        """Where it is; --teacher-placement."""
        return self.config.teacher.teacher_placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The models of a run with their layouts, those that the objective needs."""

    student: ModelSpec
    student_layout: ParallelLayout
    teachers: tuple[TeacherSpec, ...]
    reference: ModelSpec | None
    reference_layout: ParallelLayout | None

    @property
    def by_role(self) -> dict[str, ModelSpec]:
        """The models by role: ``student``, those of the teachers, ``reference``."""
        found = {"student": self.student, **{teacher.role: teacher.model for teacher in self.teachers}}
        return found | ({"reference": self.reference} if self.reference else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flags:
    """Names of the flags of one model."""

    who: str
    hf: str
    megatron: str
    prefix: Literal["", "teacher-"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _ParallelSizes:
    """Sizes of a layout as the flags give them."""

    tp: int
    pp: int
    cp: int
    ep: int
    etp: int
    chunks: int
    first_layers: int
    last_layers: int
    make_vocab_size_divisible_by: int

    def layout(self, world_size: int, owner: Literal["", "teacher-"]) -> ParallelLayout:
        """Return the layout of these sizes that fills the world.

        Raises:
            ValueError: the sizes do not fit the world; the message names the flags.
        """
        return ParallelLayout.for_world(
            world_size, self.tp, self.pp, cp=self.cp, ep=self.ep, **self._optional, owner=owner,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
        )  # fmt: skip

    @property
    def _optional(self) -> dict[str, Any]:
        """Sizes whose default a layout calls None."""
        return {
            "etp": self.etp or None, "vpp": self.chunks if self.chunks > 1 else None,
            "first_layers": self.first_layers or None, "last_layers": self.last_layers or None,
        }  # fmt: skip

    def errors(self, arch: Architecture, owner: str) -> list[str]:
        """Return why ``arch`` cannot be split with these sizes; empty when it can."""
        if min(self.tp, self.pp, self.ep, self.chunks) < 1 or min(self.first_layers, self.last_layers) < 0:
            return []  # :meth:`layout` or ``check_ranges`` reports it
        return arch.check_layout(self.tp, self.pp, ep=self.ep, **self._optional, owner=owner)


STUDENT = _Flags(who="student", hf="--hf-checkpoint", megatron="--pretrained-checkpoint", prefix="")
TEACHER = _Flags(who="teacher", hf="--teacher-hf-checkpoint", megatron="--teacher-load", prefix="teacher-")
REFERENCE = _Flags(who="reference", hf="--reference-hf-checkpoint", megatron="--reference-load", prefix="teacher-")


def _sizes_of_teacher(config: TrainConfig) -> _ParallelSizes:
    frozen = config.teacher
    return _ParallelSizes(
        tp=frozen.teacher_tensor_model_parallel_size, pp=frozen.teacher_pipeline_model_parallel_size, cp=1,
        ep=frozen.teacher_expert_model_parallel_size, etp=frozen.teacher_expert_tensor_parallel_size, chunks=1,
        first_layers=frozen.teacher_decoder_first_pipeline_num_layers,
        last_layers=frozen.teacher_decoder_last_pipeline_num_layers,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
    )  # fmt: skip


def _find_teachers(config: TrainConfig, world_size: int, problems: Problems) -> list[TeacherSpec]:
    """Find the teachers; ``world_size`` is the number of the student's ranks."""
    found = []
    for role, own in config.by_teacher.items():
        given = own.teacher
        ranks = given.teacher_world_size if given.teacher_placement == "dedicated" else world_size
        with problems.named(config.file_of(role)):
            model, layout = _find(
                TEACHER, given.teacher_hf_checkpoint, given.teacher_load, _sizes_of_teacher(own), ranks, problems
            )
        if model and layout:
            found.append(TeacherSpec(role=role, config=own, model=model, layout=layout))
    return found


def find_models(config: TrainConfig, needs: Needs, world_size: int, problems: Problems) -> Models | None:
    """Find the models that the objective needs; None if ``problems`` has errors, with those found here added to it.

    ``world_size`` is the number of the student's ranks.

    A reference given by flags has the teacher's layout.  By default the reference is the student's starting weights,
    cut as the student is (:attr:`ParallelLayout.frozen`).  Nothing is downloaded for a configuration that has errors
    already.
    """
    if problems.errors and any(is_hub_name(name) for name in _hf_names(config)):
        return None
    parallel = config.parallel
    sizes = _ParallelSizes(
        tp=parallel.tensor_model_parallel_size, pp=parallel.pipeline_model_parallel_size,
        cp=parallel.context_parallel_size, ep=parallel.expert_model_parallel_size,
        etp=parallel.expert_tensor_parallel_size, chunks=parallel.num_virtual_stages_per_pipeline_rank,
        first_layers=parallel.decoder_first_pipeline_num_layers, last_layers=parallel.decoder_last_pipeline_num_layers,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
    )  # fmt: skip
    student, student_layout = _find(
        STUDENT, config.model.hf_checkpoint, config.model.pretrained_checkpoint, sizes, world_size, problems
    )
    if student and student_layout:
        errors = training_errors(student.arch, student_layout, sequence_parallel=parallel.sequence_parallel)
        errors += [] if problems.errors else megatron_errors(config, student.arch, student_layout)
        problems.errors.extend(f"student: {error}" for error in errors)
    teachers = _find_teachers(config, world_size, problems) if needs.teacher else []
    reference = reference_layout = None
    if needs.reference_logprob and student_layout:
        reference, reference_layout = student, student_layout.frozen
    hf, megatron = config.reference.reference_hf_checkpoint, config.reference.reference_load
    if needs.reference_logprob and (hf or megatron):
        reference, reference_layout = _find(REFERENCE, hf, megatron, _sizes_of_teacher(config), world_size, problems)
    if problems.errors or student is None or student_layout is None:
        return None
    return Models(
        student=student, student_layout=student_layout, teachers=tuple(teachers), reference=reference,
        reference_layout=reference_layout,
    )  # fmt: skip


def _hf_names(config: TrainConfig) -> tuple[str, ...]:
    teachers = (own.teacher.teacher_hf_checkpoint for own in config.by_teacher.values())
    names = (config.model.hf_checkpoint, *teachers, config.reference.reference_hf_checkpoint)
    return tuple(name for name in names if name)


def pin_models(config: TrainConfig, models: Models) -> TrainConfig:
    """Return the configuration with the commit of every model that was named as on the Hub."""
    student, reference = models.student, models.reference
    pinned = {
        teacher.role: replace(teacher.config.teacher, teacher_hf_checkpoint=teacher.model.hf_name)
        for teacher in models.teachers
    }
    if pinned and config.teachers:
        named = zip(config.teachers, pinned.values(), strict=True)
        config = replace(config, teachers=tuple(replace(one, settings=settings) for one, settings in named))
    elif pinned:
        config = replace(config, teacher=pinned["teacher"])
    if reference and reference is not student:
        config = replace(config, reference=replace(config.reference, reference_hf_checkpoint=reference.hf_name))
    return replace(config, model=replace(config.model, hf_checkpoint=student.hf_name))


def _find(
    flags: _Flags, hf_checkpoint: str, megatron: str, sizes: _ParallelSizes, world_size: int, problems: Problems
) -> tuple[ModelSpec | None, ParallelLayout | None]:
    source = problems.attempt(lambda: _source(hf_checkpoint, megatron, flags))
    layout = problems.attempt(lambda: sizes.layout(world_size, flags.prefix))
    if source:
        problems.errors.extend(f"{flags.who}: {error}" for error in sizes.errors(source.arch, flags.prefix))
    return source, layout


def _source(hf_checkpoint: str, megatron: str, flags: _Flags) -> ModelSpec:
    """Find one model.  Of HF weights the safetensors headers are read, so that a truncated file is found now."""
    if not hf_checkpoint and not megatron:
        raise ValueError(f"the {flags.who} is missing: give {flags.hf} DIR or {flags.megatron} DIR")
    found: Resolved | None = None
    if hf_checkpoint:
        patterns = MODEL_CONFIG_FILES if megatron else MODEL_FILES
        found = resolve(hf_checkpoint, repo_type="model", allow_patterns=patterns, flag=flags.hf)
    source = found.source if found else ""
    try:
        hf_dir = found.path if found else hf_directory(megatron)
        if hf_dir.is_file():
            raise ValueError(f"{hf_dir} is a file; expected a directory")
        arch = load_architecture(hf_dir)
        if megatron:
            metadata = read_metadata(megatron)
            check_architecture(metadata, arch, find_checkpoint(megatron))
            source = metadata.source
        else:
            HfCheckpoint.open(hf_dir, arch)
    except (ValueError, OSError) as error:
        raise ValueError(f"{flags.who} ({flags.megatron if megatron else flags.hf}): {text_of(error)}") from error
    return ModelSpec(
        hf_dir=hf_dir, megatron_dir=Path(megatron) if megatron else None, arch=arch,
        hf_name=(found and found.source) or hf_checkpoint, source=source,
    )  # fmt: skip
