"""From a checked blueprint to the parts of a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.cli import ConfigError, to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompts import PromptSource
from megatron_tropd.models.build import HiddenStateGPT, build_gpt_model
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.parallel.groups import ModelGroups, student_groups, teacher_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.reporting.progress import NullProgress, Progress
from megatron_tropd.reporting.run_directory import RunDirectory
from megatron_tropd.reporting.sinks import Sinks, make_sinks
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.training.blueprint import Blueprint
from megatron_tropd.training.checkpoint import load_checkpoint, load_model_state
from megatron_tropd.training.checkpointing import Checkpoints
from megatron_tropd.training.engines import make_engines
from megatron_tropd.training.evaluations import Evaluations
from megatron_tropd.training.guard import Guard
from megatron_tropd.training.journal import Journal, Reader
from megatron_tropd.training.parity import ParityAlarm, probe_sequences
from megatron_tropd.training.rewarding import Rewarder
from megatron_tropd.training.run import Run
from megatron_tropd.training.sources import ModelSource
from megatron_tropd.training.student import Student, build_student, params_dtype
from megatron_tropd.weights.export import HfExporter
from megatron_tropd.weights.files import HfCheckpoint
from megatron_tropd.weights.load import load_hf_into, local_parameters

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """A run, where it starts, and what must be closed."""

    run: Run
    start_step: int
    directory: RunDirectory | None
    sinks: Sinks


def load_weights(model: HiddenStateGPT, source: ModelSource, groups: ModelGroups, config: TrainConfig) -> None:
    """Fill ``model`` from its Megatron checkpoint or its HF files; collective over the world."""
    if source.megatron_dir is not None:
        wanted = {"model": model.sharded_state_dict(metadata={"dp_cp_group": groups.pg_collection.dp_cp})}
        state, _ = load_checkpoint(source.megatron_dir, None, wanted, arch=source.arch)
        load_model_state(model, state["model"])
        return
    load_hf_into(
        model,
        HfCheckpoint.open(source.hf_dir, source.arch),
        source.arch,
        groups.layout,
        dist.get_rank(),
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
    )


def make_student(blueprint: Blueprint) -> Student:
    """The student with its first weights."""
    config = blueprint.config
    groups = student_groups(
        blueprint.models.student_layout, seed=config.training.seed, timeout_s=config.parallel.distributed_timeout_s
    )
    model = build_student(config, blueprint.models.student.arch, groups)
    load_weights(model, blueprint.models.student, groups, config)
    return Student(model, groups, config, vocab_size=blueprint.tokens.common_vocab_size)


def make_frozen(blueprint: Blueprint, source: ModelSource, groups: ModelGroups) -> MegatronTeacher:
    """A model that only scores, in the layout of ``groups``."""
    config = blueprint.config
    model = build_gpt_model(
        source.arch,
        groups,
        params_dtype=params_dtype(config),
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
    )
    load_weights(model, source, groups, config)
    return MegatronTeacher(
        model,
        groups,
        vocab_size=blueprint.tokens.common_vocab_size,
        max_tokens_per_microbatch=config.training.max_tokens_per_microbatch,
        logits_chunk_tokens=config.training.logits_chunk_tokens,
        offload=config.teacher.teacher_offload,
    )


def make_scorers(blueprint: Blueprint, student: ModelGroups) -> tuple[MegatronTeacher | None, MegatronTeacher | None]:
    """(teacher, reference), each only where the objective needs it; collective over the world."""
    models, frozen = blueprint.models, {}

    def groups_of(layout: ParallelLayout) -> ModelGroups:
        if layout not in frozen:
            frozen[layout] = teacher_groups(layout, timeout_s=blueprint.config.parallel.distributed_timeout_s)
        return frozen[layout]

    teacher = reference = None
    if models.teacher and models.teacher_layout:
        teacher = make_frozen(blueprint, models.teacher, groups_of(models.teacher_layout))
    if models.reference and models.reference_layout:
        is_student = models.reference is models.student
        groups = student if is_student else groups_of(models.reference_layout)
        reference = make_frozen(blueprint, models.reference, groups)
    return teacher, reference


def _teacher_weight(blueprint: Blueprint, teacher: MegatronTeacher | None, student: Student) -> Tensor | None:
    """Rows of the teacher's output table, where something is compared over the whole vocabulary; collective."""
    measured = blueprint.config.logging.gradient_diagnostics_interval
    if teacher is None or not (blueprint.objective.needs.divergence or measured):
        return None
    return teacher.output_rows(student.groups, student.model.vocab_size)


def make_rewarder(blueprint: Blueprint, decode: Decode) -> Rewarder | None:
    """The reward function with what it is given; None for an objective that reads no rewards."""
    if blueprint.reward_function is None:
        return None
    return Rewarder(
        function=blueprint.reward_function,
        decode=decode,
        prompts={prompt.uid: prompt for prompt in blueprint.prompts.prompts},
        pattern=re.compile(blueprint.config.evaluation.answer_pattern),
    )


def assemble(blueprint: Blueprint) -> Assembled:
    """Build everything; collective over the world."""
    config, arch = blueprint.config, blueprint.models.student.arch
    checkpoints = Checkpoints(config, arch, blueprint.models.student.hf_dir)
    start_step = checkpoints.resume_step()
    directory, sinks = _open_directory(config, start_step)
    try:
        student = make_student(blueprint)
        source = PromptSource(blueprint.prompts.prompts, config.training.seed)
        if start_step is not None:
            checkpoints.resume(student, source)
        progress = _progress(config, start_step or 0)
        decode = partial(blueprint.tokenizer.decode, skip_special_tokens=True)
        journal = _journal(blueprint, directory, sinks, progress, decode)
        exporter = HfExporter(
            arch, student.groups.layout, dist.get_rank(), dtype=params_dtype(config),
            make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        )  # fmt: skip

        def export() -> Iterator[tuple[str, Tensor]]:
            return exporter.export(local_parameters(student.model), student.groups.world)

        engines = None
        if blueprint.objective.needs.rollouts or blueprint.eval_prompts:  # servers start while models are read
            engines = make_engines(config, blueprint.models.student, blueprint.tokens, params_dtype(config), export)
        teacher, reference = make_scorers(blueprint, student.groups)
        held_out = blueprint.eval_prompts.prompts if blueprint.eval_prompts else ()
        run = Run(
            config=config,
            source=source,
            student=student,
            teacher=teacher,
            teacher_weight=_teacher_weight(blueprint, teacher, student),
            reference=reference,
            rewarder=make_rewarder(blueprint, decode),
            objective=blueprint.objective,
            engines=engines,
            export=export,
            checkpoints=checkpoints,
            guard=Guard(config.training.on_nonfinite),
            parity=ParityAlarm(config.parity_limit, config.engine.on_parity),
            probes=probe_sequences(blueprint.prompts.prompts),
            evaluations=Evaluations(config, held_out, blueprint.tokenizer, journal, progress),
            journal=journal,
            progress=progress,
        )  # fmt: skip
    except BaseException:
        _close_files(directory, sinks)
        raise
    return Assembled(run=run, start_step=start_step or 0, directory=directory, sinks=sinks)


def _journal(
    blueprint: Blueprint, directory: RunDirectory | None, sinks: Sinks, progress: NullProgress, decode: Decode
) -> Journal:
    config = blueprint.config
    reader = Reader(
        decode=decode,
        answers={p.uid: p.answer for p in blueprint.prompts.prompts if p.answer is not None},
        pattern=re.compile(config.evaluation.answer_pattern),
    )
    return Journal(
        directory,
        sinks,
        progress,
        reader,
        rollout_interval=config.logging.rollout_log_interval,
        last_step=config.training.train_iters,
    )


def _open_directory(config: TrainConfig, start_step: int | None) -> tuple[RunDirectory | None, Sinks]:
    """Rank 0 takes the run directory; all ranks fail alike when it cannot."""
    directory, failure = None, ""
    if dist.get_rank() == 0:
        try:
            directory = RunDirectory.create(
                config.logging.run_dir,
                config=to_flags(config),
                resume=start_step is not None,
                defaults=to_flags(TrainConfig()),
            )
            directory.rewind(start_step or 0)
        except (OSError, ValueError, RuntimeError) as error:
            failure = str(error)
    if failure := next(filter(None, gather_objects(failure)), ""):
        _close_files(directory, Sinks({}))
        raise ConfigError([f"--run-dir {config.logging.run_dir}: {failure}"])
    if directory is None:
        return None, Sinks({})
    sinks = make_sinks(
        tensorboard_dir=config.logging.tensorboard_dir, wandb_project=config.logging.wandb_project,
        wandb_exp_name=config.logging.wandb_exp_name, config=to_flags(config), run_dir=Path(config.logging.run_dir),
        start_step=start_step or 0,
    )  # fmt: skip
    return directory, sinks


def _progress(config: TrainConfig, start_step: int) -> NullProgress:
    if dist.get_rank():
        return NullProgress()
    return Progress(config.training.train_iters, start_step, config.logging.log_interval)


def close(assembled: Assembled) -> None:
    """Give back files, sinks and engines."""
    _close_files(assembled.directory, assembled.sinks)
    if assembled.run.engines is not None:
        assembled.run.engines.close()


def _close_files(directory: RunDirectory | None, sinks: Sinks) -> None:
    """Give back what rank 0 holds."""
    sinks.close()
    if directory is not None:
        directory.close()
