"""Check ranges of settings, and settings against each other and against the models; no file is read."""

from __future__ import annotations

from megatron_tropd.config import TrainConfig
from megatron_tropd.objectives.base import Objective
from megatron_tropd.reporting.sinks import check_sinks
from megatron_tropd.setup.model_specs import Models
from megatron_tropd.setup.problems import Problems


def check_numbers(config: TrainConfig, problems: Problems) -> None:
    """Check that required settings are given and that numbers are in their ranges."""
    training, rollout, method = config.training, config.rollout, config.method
    problems.require(config.logging.run_dir, "--run-dir is missing: name a directory for everything the run writes")
    problems.require(config.data.prompt_data, "--prompt-data is missing: name at least one file, directory or data set")
    at_least_one = {
        "train-iters": training.train_iters, "rollout-batch-size": rollout.rollout_batch_size,
        "n-samples-per-prompt": rollout.n_samples_per_prompt, "max-prompt-length": config.data.max_prompt_length,
        "max-response-length": config.data.max_response_length, "log-interval": config.logging.log_interval,
        "max-tokens-per-microbatch": training.max_tokens_per_microbatch, "top-k": method.top_k,
        "logits-chunk-tokens": training.logits_chunk_tokens, "rollout-max-batch-size": rollout.rollout_max_batch_size,
        "make-vocab-size-divisible-by": config.model.make_vocab_size_divisible_by,
        "num-minibatches": training.num_minibatches, "rollout-num-engines": config.engine.rollout_num_engines,
        "sglang-tp-size": config.engine.sglang_tp_size,
        "update-weight-buffer-size": config.engine.update_weight_buffer_size,
    }  # fmt: skip
    not_negative: dict[str, float] = {
        "min-lr": training.min_lr, "weight-decay": training.weight_decay, "clip-grad": training.clip_grad,
        "lr-warmup-iters": training.lr_warmup_iters, "save-interval": config.checkpoint.save_interval,
        "eval-interval": config.evaluation.eval_interval, "eval-prompts": config.evaluation.eval_prompts,
        "guidance-steps": config.objective.guidance_steps, "guidance-beta": method.guidance_beta,
        "parity-limit": config.engine.parity_limit,
        "gradient-diagnostics-interval": config.logging.gradient_diagnostics_interval,
        "rollout-log-interval": config.logging.rollout_log_interval, "outlier-coef": method.outlier_coef,
    }  # fmt: skip
    for name, count in at_least_one.items():
        problems.require(count >= 1, f"--{name} {count} must be at least 1")
    for name, value in not_negative.items():
        problems.require(value >= 0, f"--{name} {value} must not be negative")
    minutes = config.parallel.distributed_timeout_minutes
    problems.require(minutes > 0, f"--distributed-timeout-minutes {minutes} must be positive")
    problems.require(training.adam_eps > 0, f"--adam-eps {training.adam_eps} must be positive")
    problems.require(training.lr > 0, f"--lr {training.lr} must be positive")
    problems.require(0 <= training.adam_beta1 < 1, f"--adam-beta1 {training.adam_beta1} must be in [0, 1)")
    problems.require(0 <= training.adam_beta2 < 1, f"--adam-beta2 {training.adam_beta2} must be in [0, 1)")
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
            "megatron_tropd.rewards:exact_match",
        )
        problems.require(
            samples >= 2,
            f"{name} compares the samples of a prompt: --n-samples-per-prompt {samples} must be at least 2",
        )
    problems.require(
        needs.top_k or not config.logging.log_topk_overlap,
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
        "--teacher-load": not needs.teacher and config.teacher.teacher_load,
        "--reference-hf-checkpoint": not needs.reference_logprob and config.reference.reference_hf_checkpoint,
        "--reference-load": not needs.reference_logprob and config.reference.reference_load,
        "--reward-function": not needs.rewards and config.reward.reward_function,
    }
    problems.warnings.extend(f"{name} does not use {flag} {value}" for flag, value in unused.items() if value)


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
    for who, source in (("student", models.student), ("teacher", models.teacher), ("reference", models.reference)):
        if source is None:
            continue
        limit = source.arch.max_position_embeddings
        problems.require(
            longest <= limit, f"{what} = {longest} tokens exceed the {who}'s max_position_embeddings {limit}"
        )
