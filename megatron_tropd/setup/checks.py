"""Check ranges of settings, and settings against each other and against the models; no file is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron_tropd.config import TrainConfig
from megatron_tropd.models.attention import ATTENTION_DTYPES, attention_kind
from megatron_tropd.objectives.base import Objective
from megatron_tropd.parallel import platform
from megatron_tropd.reporting.sinks import check_sinks
from megatron_tropd.setup.model_specs import Models
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.ranges import check_ranges
from megatron_tropd.training.student import params_dtype


def check_numbers(config: TrainConfig, problems: Problems) -> None:
    """Check that required settings are given and that numbers are in their ranges."""
    training, rollout = config.training, config.rollout
    problems.require(config.logging.run_dir, "--run-dir is missing: name a directory for everything the run writes")
    problems.require(config.data.prompt_data, "--prompt-data is missing: name at least one file, directory or data set")
    check_ranges(config, problems)
    problems.require(training.min_lr <= training.lr, f"--min-lr {training.min_lr} is above --lr {training.lr}")
    problems.require(
        training.lr_warmup_iters <= max(config.num_updates, 0),
        f"--lr-warmup-iters {training.lr_warmup_iters} is above the {config.num_updates} updates of the run "
        "(--train-iters times --num-minibatches)",
    )
    if training.num_minibatches >= 1:
        problems.require(
            rollout.rollout_batch_size % training.num_minibatches == 0,
            f"--num-minibatches {training.num_minibatches} does not divide the --rollout-batch-size "
            f"{rollout.rollout_batch_size} prompts of a step",
        )
    saved, kept = config.checkpoint.save_interval, config.checkpoint.save_retain_interval
    problems.require(
        not kept or (saved >= 1 and kept % saved == 0),
        f"--save-retain-interval {kept} is not a multiple of --save-interval {saved}: no checkpoint would be made at "
        "some of the steps that are to be kept",
    )
    problems.errors.extend(
        check_sinks(tensorboard_dir=config.logging.tensorboard_dir, wandb_project=config.logging.wandb_project)
    )


def check_method(config: TrainConfig, objective: Objective, problems: Problems) -> None:
    """Check that the settings suit the objective; settings that it does not use give a warning."""
    needs, name = objective.needs, f"--objective {config.objective.objective}"
    samples = config.rollout.n_samples_per_prompt
    if needs.rewards:
        problems.require(
            config.reward.reward_function,
            f"{name} learns from rewards: give --reward-function package.module:function, such as "
            "megatron_tropd.grading.rewards:exact_match",
        )
        problems.require(
            samples >= 2,
            f"{name} compares the samples of a prompt: --n-samples-per-prompt {samples} must be at least 2",
        )
    problems.require(
        needs.top_k > needs.student_top_k or not config.logging.log_topk_overlap,
        f"--log-topk-overlap compares with the teacher's top-k, which {name} does not ask for",
    )
    if not needs.rollouts:
        problems.require(
            config.guidance.mode == "none",
            f"{name} imitates whole responses and writes nothing: --guidance {config.objective.guidance} has no "
            "meaning with it, leave it at auto or none",
        )
    unused = {
        "--teacher-hf-checkpoint": not needs.teacher and config.teacher.teacher_hf_checkpoint,
        "--teacher-config": not needs.teacher and " ".join(config.teacher.teacher_config),
        "--teacher-load": not needs.teacher and config.teacher.teacher_load,
        "--reference-hf-checkpoint": not needs.reference_logprob and config.reference.reference_hf_checkpoint,
        "--reference-load": not needs.reference_logprob and config.reference.reference_load,
        "--reward-function": not needs.rewards and config.reward.reward_function,
    }
    problems.warnings.extend(f"{name} does not use {flag} {value}" for flag, value in unused.items() if value)


def check_attention(config: TrainConfig, models: Models, problems: Problems) -> None:
    """Warn where a GPU would compute packed attention on a padded table."""
    head_dims = {who: spec.arch.head_dim for who, spec in models.by_role.items()}
    problems.warnings.extend(attention_warnings(params_dtype(config), head_dims))


def attention_warnings(dtype: torch.dtype, head_dims: Mapping[str, int]) -> list[str]:
    """Return a warning for each model, by the size of its heads, whose packed attention a GPU pads."""
    if not platform.is_cuda() or (platform.has_transformer_engine() and dtype in ATTENTION_DTYPES):
        return []
    kinds = {who: attention_kind(dtype, head_dim) for who, head_dim in head_dims.items()}
    return [
        f"attention of the {who} pads every sequence of a micro-batch to the longest, because {why}; its memory grows "
        "with their number x the longest, its time with their number x the longest squared"
        for who, (kind, why) in kinds.items()
        if kind == "padded"
    ]


def check_lengths(config: TrainConfig, models: Models, objective: Objective, problems: Problems) -> None:
    """Check that the longest sequence fits into a micro-batch and into every model."""
    data = config.data
    longest = data.max_prompt_length + data.max_response_length
    what = f"--max-prompt-length {data.max_prompt_length} + --max-response-length {data.max_response_length}"
    if not objective.needs.rollouts:  # a response of the data comes with its stop token
        longest, what = longest + 1, f"{what} + 1 (the stop token)"
    budget = config.training.max_tokens_per_microbatch
    problems.require(
        longest <= budget,
        f"{what} = {longest} tokens do not fit --max-tokens-per-microbatch {budget}; raise it or lower them",
    )
    for who, source in models.by_role.items():
        limit, window = source.arch.max_position_embeddings, source.arch.attention_window
        problems.require(
            longest <= limit, f"{what} = {longest} tokens exceed the {who}'s max_position_embeddings {limit}"
        )
        problems.require(
            window is None or longest <= window,
            f"{what} = {longest} tokens exceed the {who}'s sliding_window {window}, and attention to a window is not "
            f"implemented: lower --max-prompt-length and --max-response-length to {window} tokens together",
        )
