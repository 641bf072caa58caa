"""Check a run's configuration and the files it names, before any process group or model is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tropd.checkpoints.directory import (
    RELEASE,
    find_checkpoint,
    is_being_replaced,
    latest_iteration,
    read_metadata,
)
from megatron_tropd.checkpoints.fallback import with_advice
from megatron_tropd.checkpoints.metadata import CheckpointError, check_architecture
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.grading.grader import Grader, make_grader
from megatron_tropd.grading.rewards import RewardFunction, load_reward_function
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.objectives.base import Objective
from megatron_tropd.parallel.roles import Role, split
from megatron_tropd.setup.checks import check_attention, check_lengths, check_method, check_numbers
from megatron_tropd.setup.engine_checks import check_engine_flags, check_engine_layout
from megatron_tropd.setup.engine_settings import sglang_settings
from megatron_tropd.setup.gpus import ServerGpus, assign_gpus
from megatron_tropd.setup.model_specs import Models, find_models, pin_models
from megatron_tropd.setup.objective import objective_of
from megatron_tropd.setup.path_checks import check_directories
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.run_data import RunData, load_run_data
from megatron_tropd.setup.teacher_checks import check_all_scores, check_domains, check_teachers
from megatron_tropd.setup.teacher_servers import teacher_server_settings
from megatron_tropd.teacher.preflight import TokenizerReport, check_same_tokens, join_reports, student_tokens
from megatron_tropd.types import Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSpec:
    """A checked configuration, and what was read from the files it names."""

    config: TrainConfig
    """As given, but models that were named as on the Hub have their commit."""
    models: Models
    tokens: TokenizerReport
    tokenizer: Any
    data: RunData
    objective: Objective
    reward_function: RewardFunction | None
    grader: Grader
    roles: tuple[Role, ...]
    """Which ranks of the job do what; the first are the trainer's."""
    gpus: ServerGpus
    """Which GPUs of this machine the servers have that the run starts."""
    warnings: tuple[str, ...]


def make_run_spec(config: TrainConfig, world_size: int) -> RunSpec:
    """Check ``config`` against the world size and the files it names.  Reads headers and prompts, no weights.

    Raises:
        ConfigError: the configuration cannot be used; one message lists what is wrong.
    """
    problems = Problems()
    check_numbers(config, problems)
    check_directories(config, problems)
    check_engine_flags(config, problems)
    objective = problems.attempt(lambda: objective_of(config))
    if objective:
        check_method(config, objective, problems)
        check_teachers(config, objective, problems)
    needs = objective.needs if objective else Needs()
    reward_path = config.reward.reward_function if needs.rewards else ""
    reward_function = problems.attempt(lambda: load_reward_function(reward_path)) if reward_path else None
    grading = config.evaluation
    grader = problems.attempt(
        lambda: make_grader(grading.grader, grading.answer_pattern, lenient=grading.lenient_grading)
    )
    roles = problems.attempt(lambda: _roles(config, needs, world_size)) or split(world_size, ())
    gpus = assign_gpus(config, problems)
    models = find_models(config, needs, roles[0].size, problems)
    problems.stop_if_any()
    assert models and objective and grader
    check_lengths(config, models, objective, problems)
    if config.engine.rollout_engine == "sglang":
        problems.attempt(lambda: sglang_settings(config, models.student, gpus.engines))
    for teacher in models.teachers:
        if teacher.placement == "server":
            with problems.named(config.file_of(teacher.role)):
                problems.attempt(
                    lambda teacher=teacher: teacher_server_settings(teacher, gpus.of_teacher(teacher.role))  # type: ignore[misc]
                )
    check_engine_layout(config, models, problems)
    check_attention(config, models, problems)
    problems.attempt(lambda: _check_resume(config, models.student.arch))
    tokens = problems.attempt(lambda: _tokens(config, models))
    if tokens:
        top_k, common = needs.top_k, tokens.common_vocab_size
        problems.require(top_k <= common, f"--top-k {top_k} is larger than the common vocabulary of {common} tokens")
        problems.warnings.extend(tokens.warnings)
    tokenizer = problems.attempt(lambda: load_tokenizer(models.student.hf_dir))
    data = None
    if tokenizer and tokens:
        stop_ids = tokens.teacher_stop_ids
        data = load_run_data(config, objective, reward_function, tokenizer, stop_ids, problems)
    if data and tokens and models.teachers and not problems.errors:
        check_domains(config, data.prompts, problems)
        check_all_scores(config, objective, data.prompts, tokens.common_vocab_size, problems)
    problems.stop_if_any()
    assert tokens and data
    return RunSpec(
        config=pin_models(config, models), models=models, tokens=tokens, tokenizer=tokenizer, data=data,
        objective=objective, reward_function=reward_function, grader=grader, roles=roles,
        gpus=gpus, warnings=tuple(problems.warnings),
    )  # fmt: skip


def _roles(config: TrainConfig, needs: Needs, world_size: int) -> tuple[Role, ...]:
    """Split the job's ranks between the student and the dedicated teachers.

    Raises:
        ValueError: a placement does not fit its --teacher-world-size, or these and --student-world-size do not fit
            the job.
    """
    others = []
    for role, own in config.by_teacher.items():
        placement, size = own.teacher.teacher_placement, own.teacher.teacher_world_size
        where = f"{config.file_of(role)}: ".removeprefix(": ")
        if placement != "dedicated":
            if size:
                raise ValueError(
                    f"{where}--teacher-world-size {size} is for --teacher-placement dedicated; it is {placement}: "
                    "change one"
                )
            continue
        if not needs.teacher:
            raise ValueError(
                f"{where}--objective {config.objective.objective} has no teacher: leave out --teacher-placement "
                "dedicated"
            )
        if size < 1:
            raise ValueError(
                f"{where}--teacher-placement dedicated needs --teacher-world-size: how many of the "
                f"{world_size} ranks that torchrun started are the teacher's"
            )
        others.append((role, size))
    roles = split(world_size, others)
    student, given = roles[0].size, config.parallel.student_world_size
    if given and given != student:
        taken = f", of which {world_size - student} are teachers' (--teacher-world-size)" if others else ""
        raise ValueError(
            f"--student-world-size {given}: torchrun started {world_size} ranks{taken}, so the student has {student}: "
            "change one of them, or --nproc-per-node or --nnodes"
        )
    return roles


def _tokens(config: TrainConfig, models: Models) -> TokenizerReport:
    """Check that all models use the same tokens, and return their common vocabulary.

    Raises:
        ConfigError: tokenizers differ.
    """
    student, reference = models.student, models.reference
    found, problems = [], Problems()
    for teacher in models.teachers:
        with problems.named(config.file_of(teacher.role)):
            report = problems.attempt(
                lambda teacher=teacher: check_same_tokens(student.hf_dir, teacher.model.hf_dir)  # type: ignore[misc]
            )
        found += [report] if report else []
    problems.stop_if_any()
    tokens = join_reports(found) if found else student_tokens(student.hf_dir)
    if reference is None or reference is student:
        return tokens
    common = check_same_tokens(student.hf_dir, reference.hf_dir, "reference").common_vocab_size
    return replace(tokens, common_vocab_size=min(tokens.common_vocab_size, common))


def _check_resume(config: TrainConfig, arch: Architecture) -> None:
    """Check the checkpoint that the run would resume from, if there is one.

    Raises:
        ValueError: it holds converted weights and not a run, or a model of another architecture.
    """
    load_dir = config.load_dir
    if config.checkpoint.load_step is not None or is_being_replaced(Path(load_dir)):
        return  # it is only read, and compared when it is; or its name is given back when the run directory is taken
    try:
        iteration = latest_iteration(load_dir)
        metadata = read_metadata(load_dir) if isinstance(iteration, int) else None
    except CheckpointError as error:
        if config.checkpoint.fallback_previous:
            return  # which checkpoint is whole is found when all ranks can look
        raise with_advice(error, load_dir) from error
    if metadata is not None:
        check_architecture(metadata, arch, find_checkpoint(load_dir))
    elif iteration == RELEASE and config.checkpoint.load:
        raise ValueError(
            f"--load {load_dir} holds converted weights ('release'), not a run to go on with; give it to "
            "--pretrained-checkpoint"
        )
