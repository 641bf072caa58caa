"""Everything that can be known, and refused, before a process group or a model exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_tropd.cli import ConfigError
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.guidance import check_guidance
from megatron_tropd.data.prompts import PromptFormat, PromptSet, load_prompts
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.models.architecture import Architecture, architecture_from_hf_config, load_hf_config
from megatron_tropd.objectives.base import Objective
from megatron_tropd.objectives.methods import make_objective
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.reporting.sinks import check_sinks
from megatron_tropd.teacher.preflight import TokenizerReport, check_same_tokens
from megatron_tropd.training.checkpoint_directory import (
    RELEASE,
    find_checkpoint,
    hf_directory,
    latest_iteration,
    read_metadata,
)
from megatron_tropd.training.checkpoint_metadata import check_architecture
from megatron_tropd.weights.files import HfCheckpoint

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model's config, tokenizer and weights are."""

    hf_dir: Path
    """Config and tokenizer; weights too unless ``megatron_dir`` is given."""
    megatron_dir: Path | None
    arch: Architecture


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A configuration that was held against the files it names."""

    config: TrainConfig
    student: ModelSource
    teacher: ModelSource
    student_layout: ParallelLayout
    teacher_layout: ParallelLayout
    tokens: TokenizerReport
    tokenizer: Any
    prompts: PromptSet
    eval_prompts: PromptSet | None
    objective: Objective


class _Findings:
    """Collects complaints, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def attempt(self, call: Callable[[], T]) -> T | None:
        """The value of ``call``, or None and its complaint noted."""
        try:
            return call()
        except ConfigError as error:
            self.errors.extend(error.errors)
        except (ValueError, OSError) as error:
            self.errors.append(str(error))
        return None

    def require(self, condition: object, complaint: str) -> None:
        """Note ``complaint`` unless ``condition`` holds."""
        if not condition:
            self.errors.append(complaint)

    def stop_if_any(self) -> None:
        """End the checks here when later ones would only repeat what is wrong."""
        if self.errors:
            raise ConfigError(self.errors)


def check(config: TrainConfig, world_size: int) -> Blueprint:
    """Hold ``config`` against the world and the files it names.  Reads headers and prompts, no weights.

    Raises:
        ConfigError: everything that is wrong, in one message.
    """
    found = _Findings()
    _check_numbers(config, found)
    student = found.attempt(lambda: _source(config.model.hf_checkpoint, config.model.pretrained_checkpoint, STUDENT))
    teacher = found.attempt(lambda: _source(config.teacher.teacher_hf_checkpoint, config.teacher.teacher_load, TEACHER))
    layouts = _layouts(config, world_size, student, teacher, found)
    objective = found.attempt(lambda: make_objective(config.objective.objective, config.objective_settings))
    found.stop_if_any()
    assert student and teacher and layouts and objective
    _check_lengths(config, student, teacher, found)
    found.attempt(lambda: _check_resume(config, student.arch))
    tokens = found.attempt(lambda: check_same_tokens(student.hf_dir, teacher.hf_dir))
    if tokens:
        top_k, common = objective.needs.top_k, tokens.common_vocab_size
        found.require(top_k <= common, f"--top-k {top_k} is larger than the common vocabulary of {common} tokens")
    tokenizer = found.attempt(lambda: load_tokenizer(student.hf_dir))
    prompts = _prompts(config, tokenizer, tokens, config.data.prompt_data, found) if tokenizer and tokens else None
    if prompts:
        found.errors.extend(check_guidance(prompts.prompts, config.guidance))
    eval_prompts = None
    if config.evaluation.eval_data and tokenizer and tokens:
        already = len(found.errors)
        eval_prompts = _prompts(config, tokenizer, tokens, config.evaluation.eval_data, found)
        # The reader serves both and names the flag of training.
        found.errors[already:] = [text.replace("--prompt-data", "--eval-data") for text in found.errors[already:]]
        missing = sum(prompt.answer is None for prompt in eval_prompts.prompts) if eval_prompts else 0
        found.require(not missing, f"--eval-data: {missing} rows have no {config.data.answer_key!r} (--answer-key)")
    found.stop_if_any()
    assert tokens and prompts
    return Blueprint(
        config=config, student=student, teacher=teacher, student_layout=layouts[0], teacher_layout=layouts[1],
        tokens=tokens, tokenizer=tokenizer, prompts=prompts, eval_prompts=eval_prompts, objective=objective,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flags:
    """How the flags of one model are called."""

    who: str
    hf: str
    megatron: str
    prefix: str


STUDENT = _Flags(who="student", hf="--hf-checkpoint", megatron="--pretrained-checkpoint", prefix="")
TEACHER = _Flags(who="teacher", hf="--teacher-hf-checkpoint", megatron="--teacher-load", prefix="teacher-")


def _source(hf_checkpoint: str, megatron: str, flags: _Flags) -> ModelSource:
    """Find one model; its safetensors headers are read, so a truncated file is found now."""
    if not hf_checkpoint and not megatron:
        raise ValueError(f"the {flags.who} is missing: give {flags.hf} DIR or {flags.megatron} DIR")
    try:
        hf_dir = Path(hf_checkpoint) if hf_checkpoint else hf_directory(megatron)
        arch = architecture_from_hf_config(load_hf_config(hf_dir))
        if megatron:
            check_architecture(read_metadata(megatron), arch, find_checkpoint(megatron))
        else:
            HfCheckpoint.open(hf_dir, arch)
    except (ValueError, OSError) as error:
        raise ValueError(f"{flags.who} ({flags.megatron if megatron else flags.hf}): {error}") from error
    return ModelSource(hf_dir=hf_dir, megatron_dir=Path(megatron) if megatron else None, arch=arch)


def _layouts(
    config: TrainConfig, world_size: int, student: ModelSource | None, teacher: ModelSource | None, found: _Findings
) -> tuple[ParallelLayout, ParallelLayout] | None:
    sizes = (
        (STUDENT, student, config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size),
        (TEACHER, teacher, config.teacher.teacher_tensor_model_parallel_size,
         config.teacher.teacher_pipeline_model_parallel_size),
    )  # fmt: skip
    layouts = []
    for flags, source, tp, pp in sizes:
        layout = found.attempt(
            lambda tp=tp, pp=pp, flags=flags: ParallelLayout.for_world(world_size, tp, pp, owner=flags.prefix)
        )
        if source and tp > 0 and pp > 0:
            errors = source.arch.check_layout(tp, pp, owner=flags.prefix)
            found.errors.extend(f"{flags.who}: {error}" for error in errors)
        if layout:
            layouts.append(layout)
    return (layouts[0], layouts[1]) if len(layouts) == 2 else None


def _check_numbers(config: TrainConfig, found: _Findings) -> None:
    training, rollout, objective = config.training, config.rollout, config.objective
    found.require(config.logging.run_dir, "--run-dir is missing: name a directory for everything the run writes")
    found.require(config.data.prompt_data, "--prompt-data is missing: name at least one .jsonl or .parquet file")
    at_least_one = {
        "train-iters": training.train_iters, "rollout-batch-size": rollout.rollout_batch_size,
        "n-samples-per-prompt": rollout.n_samples_per_prompt, "max-prompt-length": config.data.max_prompt_length,
        "max-response-length": config.data.max_response_length, "log-interval": config.logging.log_interval,
        "max-tokens-per-microbatch": training.max_tokens_per_microbatch, "top-k": objective.top_k,
        "logits-chunk-tokens": training.logits_chunk_tokens, "rollout-max-batch-size": rollout.rollout_max_batch_size,
        "make-vocab-size-divisible-by": config.model.make_vocab_size_divisible_by,
    }  # fmt: skip
    not_negative = {
        "min-lr": training.min_lr, "weight-decay": training.weight_decay, "clip-grad": training.clip_grad,
        "lr-warmup-iters": training.lr_warmup_iters, "save-interval": config.checkpoint.save_interval,
        "eval-interval": config.evaluation.eval_interval, "eval-prompts": config.evaluation.eval_prompts,
        "guidance-steps": objective.guidance_steps, "guidance-beta": objective.guidance_beta,
        "rollout-log-interval": config.logging.rollout_log_interval, "outlier-coef": objective.outlier_coef,
    }  # fmt: skip
    for name, value in at_least_one.items():
        found.require(value >= 1, f"--{name} {value} must be at least 1")
    for name, value in not_negative.items():
        found.require(value >= 0, f"--{name} {value} must not be negative")
    minutes = config.parallel.distributed_timeout_minutes
    found.require(minutes > 0, f"--distributed-timeout-minutes {minutes} must be positive")
    found.require(training.lr > 0, f"--lr {training.lr} must be positive")
    found.require(0 <= training.adam_beta1 < 1, f"--adam-beta1 {training.adam_beta1} must be in [0, 1)")
    found.require(0 <= training.adam_beta2 < 1, f"--adam-beta2 {training.adam_beta2} must be in [0, 1)")
    found.require(training.min_lr <= training.lr, f"--min-lr {training.min_lr} is above --lr {training.lr}")
    found.require(
        training.lr_warmup_iters <= training.train_iters,
        f"--lr-warmup-iters {training.lr_warmup_iters} is above --train-iters {training.train_iters}",
    )
    found.errors.extend(
        check_sinks(tensorboard_dir=config.logging.tensorboard_dir, wandb_project=config.logging.wandb_project)
    )
    pattern = found.attempt(lambda: _compile(config.evaluation.answer_pattern))
    found.require(pattern is None or pattern.groups >= 1, "--answer-pattern needs a group that holds the answer: (...)")


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--answer-pattern {pattern!r} is not a regular expression: {error}") from None


def _check_lengths(config: TrainConfig, student: ModelSource, teacher: ModelSource, found: _Findings) -> None:
    data = config.data
    longest = data.max_prompt_length + data.max_response_length
    what = f"--max-prompt-length {data.max_prompt_length} + --max-response-length {data.max_response_length}"
    budget = config.training.max_tokens_per_microbatch
    found.require(
        longest <= budget,
        f"{what} = {longest} tokens do not fit --max-tokens-per-microbatch {budget}; raise it or lower them",
    )
    for flags, source in ((STUDENT, student), (TEACHER, teacher)):
        limit = source.arch.max_position_embeddings
        found.require(
            longest <= limit, f"{what} = {longest} tokens exceed the {flags.who}'s max_position_embeddings {limit}"
        )


def _check_resume(config: TrainConfig, arch: Architecture) -> None:
    """The checkpoint a run would go on from, if there is one.

    Raises:
        ValueError: it is none of a run, or of another architecture.
    """
    load_dir = config.load_dir
    iteration = latest_iteration(load_dir)
    if isinstance(iteration, int):
        check_architecture(read_metadata(load_dir), arch, find_checkpoint(load_dir))
    elif iteration == RELEASE and config.checkpoint.load:
        raise ValueError(
            f"--load {load_dir} holds converted weights ('release'), not a run to go on with; give it to "
            "--pretrained-checkpoint"
        )


def _prompts(
    config: TrainConfig, tokenizer: Any, tokens: TokenizerReport, files: list[str], found: _Findings
) -> PromptSet | None:
    data = config.data
    fmt = PromptFormat(
        prompt_key=data.prompt_key, response_key=data.response_key, answer_key=data.answer_key,
        domain_key=data.domain_key, chat_template=data.apply_chat_template, max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length, on_bad_row=data.on_bad_row,
    )  # fmt: skip
    return found.attempt(lambda: load_prompts(files, tokenizer, fmt, stop_ids=tokens.teacher_stop_ids))
