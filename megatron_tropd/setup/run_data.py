"""Load the prompts of a run, and check that they have what its method reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.config import TrainConfig
from megatron_tropd.data.guidance import check_guidance
from megatron_tropd.data.prompts import PromptFormat, PromptSet, load_prompts
from megatron_tropd.grading.references import check_references
from megatron_tropd.grading.rewards import RewardFunction, exact_match
from megatron_tropd.objectives.base import Objective
from megatron_tropd.setup.problems import Problems
from megatron_tropd.standard_streams import tell


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The data of a run, and what to tell the user about it."""

    prompts: PromptSet
    eval_prompts: PromptSet | None
    notes: tuple[str, ...]


def load_run_data(
    config: TrainConfig,
    objective: Objective,
    reward: RewardFunction | None,
    tokenizer: Any,
    stop_ids: tuple[int, ...],
    problems: Problems,
) -> RunData | None:
    """Load and check --prompt-data and --eval-data; None if there are errors, which are then in ``problems``.

    All ranks call this at one time and divide the tokenizing (``data/token_cache/build.py``).
    """
    reads_responses = config.guidance.mode != "none" or not objective.needs.rollouts
    prompts = problems.attempt(
        lambda: _load(config, config.data.prompt_data, "--prompt-data", tokenizer, stop_ids, responses=reads_responses)
    )
    if prompts:
        _check(config, objective, reward, prompts, problems)
    held_out = None
    if config.evaluation.eval_data:
        held_out = problems.attempt(
            lambda: _load(config, config.evaluation.eval_data, "--eval-data", tokenizer, stop_ids, responses=False)
        )
        if held_out:
            _require_answers(held_out, "--eval-data", config, problems)
            _check_answers(held_out, "--eval-data", config, problems)
    if not prompts:
        return None
    notes = [_note("--prompt-data", prompts, responses=reads_responses)]
    notes += [_note("--eval-data", held_out, responses=False)] if held_out else []
    return RunData(prompts=prompts, eval_prompts=held_out, notes=tuple(notes))


def _load(
    config: TrainConfig, names: list[str], flag: str, tokenizer: Any, stop_ids: tuple[int, ...], *, responses: bool
) -> PromptSet:
    data = config.data
    fmt = PromptFormat(
        prompt_key=data.prompt_key, response_key=data.response_key if responses else "", answer_key=data.answer_key,
        grader_key=data.grader_key,
        domain_key=data.domain_key, uid_key=data.uid_key, tools_key=data.tools_key,
        chat_template=data.apply_chat_template, max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length, on_long_response=data.on_long_response,
        on_bad_row=data.on_bad_row,
    )  # fmt: skip
    root = Path(data.data_cache_path) if data.data_cache_path else None
    return load_prompts(names, tokenizer, fmt, stop_ids=stop_ids, cache_root=root, flag=flag, say=_say)


def _say(text: str) -> None:
    """Print the progress of long work, once a node."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tell(text)


def _check(
    config: TrainConfig, objective: Objective, reward: RewardFunction | None, prompts: PromptSet, problems: Problems
) -> None:
    """Check that the prompts have the columns that the method reads, and that there are enough of them."""
    responses = prompts.summary.num_responses
    problems.errors.extend(
        check_guidance(
            config.guidance, num_prompts=len(prompts), num_responses=responses,
            min_share=config.data.min_response_share,
        )
    )  # fmt: skip
    if not objective.needs.rollouts:
        problems.require(
            responses == len(prompts),
            f"--objective {config.objective.objective} learns from responses, but {len(prompts) - responses} of "
            f"{len(prompts)} rows of --prompt-data have no {config.data.response_key!r} (--response-key)",
        )
    if objective.needs.rollouts:
        _check_answers(prompts, "--prompt-data", config, problems)
    if reward is exact_match:
        _require_answers(prompts, "--reward-function megatron_tropd.grading.rewards:exact_match", config, problems)
    updates = config.training.num_minibatches
    problems.require(
        len(prompts) >= updates,
        f"--num-minibatches {updates} needs as many prompts, --prompt-data has {len(prompts)}",
    )


def _require_answers(prompts: PromptSet, flag: str, config: TrainConfig, problems: Problems) -> None:
    missing = len(prompts) - prompts.summary.num_answers
    problems.require(not missing, f"{flag}: {missing} rows have no {config.data.answer_key!r} (--answer-key)")


def _check_answers(prompts: PromptSet, flag: str, config: TrainConfig, problems: Problems) -> None:
    """Check that a response can give the answers that the prompts have."""
    faults = check_references(prompts.answers(), config.evaluation.grader)
    problems.errors.extend(f"{flag}: {fault} (--answer-key {config.data.answer_key})" for fault in faults)


def _note(flag: str, prompts: PromptSet, *, responses: bool) -> str:
    """Return one line about the data: how many prompts, with how many responses, and what was left out or cut."""
    summary, count = prompts.summary, len(prompts)
    parts = [f"{flag}: {count:,} prompts"]
    if responses:
        parts.append(f"{summary.num_responses:,} with a response ({summary.num_responses / count:.1%})")
    if summary.num_cut:
        parts.append(f"{summary.num_cut:,} responses cut to --max-response-length")
    if summary.num_dropped:
        parts.append(f"{summary.num_dropped:,} rows left out by --on-long-response skip")
    if summary.num_faults:
        first = f" (the first: {prompts.skipped[0]})" if prompts.skipped else ""
        parts.append(f"{summary.num_faults:,} bad rows left out by --on-bad-row skip{first}")
    commits = [f"{source.given} at commit {source.revision}" for source in prompts.sources if source.revision]
    return ", ".join([*parts, *commits])
