"""Measure the accuracy of the student on prompts with known answers, for several ways of decoding."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.rng import Stream
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import EvalReport, GenerationRequest, Prompt, Rollout

if TYPE_CHECKING:  # importing transformers takes seconds
    from transformers import PreTrainedTokenizerBase

Generate = Callable[[Sequence[GenerationRequest], SamplingParams], Sequence[Rollout]]
"""Returns one rollout per request, in order: ``generate`` of one engine, or of a pool over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """One way of drawing tokens."""

    name: str
    temperature: float
    top_p: float


GREEDY = Decoding(name="greedy", temperature=0.0, top_p=1.0)
TOP_P_07 = Decoding(name="top_p_0.7", temperature=1.0, top_p=0.7)
TEMPERATURE_1 = Decoding(name="temperature_1", temperature=1.0, top_p=1.0)
DECODINGS = {decoding.name: decoding for decoding in (GREEDY, TOP_P_07, TEMPERATURE_1)}


def extract_answer(text: str, pattern: re.Pattern[str]) -> str | None:
    """Return group 1 of the first match of ``pattern``, with each run of whitespace as one space; None if there is no
    match, or group 1 takes no part in it."""
    match = pattern.search(text)
    return None if match is None or match.group(1) is None else " ".join(match.group(1).split())


def exact_match(rollout_text: str, finished: bool, answer: str, pattern: re.Pattern[str]) -> bool:
    """Return whether a response that ended with a stop token gives exactly ``answer``.

    A truncated response is wrong even if it contains the answer, because the student did not finish.
    """
    return finished and extract_answer(rollout_text, pattern) == " ".join(answer.split())


def _check(prompts: Sequence[Prompt], pattern: re.Pattern[str]) -> None:
    if not prompts:
        raise ValueError("no prompts to evaluate; check --eval-data")
    if pattern.groups < 1:
        raise ValueError(
            f"--answer-pattern {pattern.pattern!r} has no group; put the answer in parentheses, as in '= *(.+)$'"
        )
    if without := [prompt.uid for prompt in prompts if prompt.answer is None]:
        raise ValueError(
            f"{len(without)} of {len(prompts)} evaluation prompts have no answer (first: uid {without[0]}); "
            "check --eval-data and --answer-key"
        )


def _requests(prompts: Sequence[Prompt], num_samples: int, max_new_tokens: int) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            prompt_uid=prompt.uid,
            sample_index=sample,
            token_ids=prompt.token_ids,
            prompt_len=len(prompt.token_ids),
            guidance_len=0,
            max_new_tokens=max_new_tokens,
        )
        for prompt in prompts
        for sample in range(num_samples)
    ]


def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    decodings: Sequence[Decoding],
    *,
    answer_pattern: str | re.Pattern[str],
    max_response_length: int,
    seed: int,
    step: int,
    num_samples: int = 1,
) -> list[EvalReport]:
    """Answer the prompts with every decoding and return one report per decoding, the same on every rank.

    Args:
        generate: generates with the student's weights; over several ranks it is collective and returns all
            rollouts on each of them.
        prompts: each with an answer.
        tokenizer: turns responses into text; special tokens are left out.
        decodings: e.g. ``DECODINGS.values()``.
        answer_pattern: regular expression whose group 1 is the answer.
        max_response_length: tokens; a response cut there counts as wrong.
        seed: seed of the sampling; the random numbers depend on ``step`` too and differ from those of training.
        step: number of training steps (rollout batches) done; goes into the reports.
        num_samples: responses per prompt, averaged (greedy decoding always writes one).

    Raises:
        ValueError: there are no prompts, a prompt has no answer, or the pattern has no group.
        EngineError: the engine cannot generate.
    """
    pattern = re.compile(answer_pattern)
    _check(prompts, pattern)
    answers = {prompt.uid: prompt.answer for prompt in prompts if prompt.answer is not None}
    reports = []
    for decoding in decodings:
        params = SamplingParams(
            temperature=decoding.temperature, top_p=decoding.top_p, seed=seed, stream=Stream.EVALUATION, step=step
        )
        requests = _requests(prompts, num_samples if decoding.temperature > 0 else 1, max_response_length)
        rollouts = generate(requests, params)
        reports.append(_report(decoding, rollouts, answers, tokenizer, pattern, step=step))
    return reports


def _report(
    decoding: Decoding, rollouts: Sequence[Rollout], answers: dict[int, str], tokenizer: PreTrainedTokenizerBase,
    pattern: re.Pattern[str], *, step: int,
) -> EvalReport:  # fmt: skip
    correct = 0
    for rollout in rollouts:
        text = tokenizer.decode(list(rollout.token_ids[rollout.prompt_len :]), skip_special_tokens=True)
        correct += exact_match(str(text), rollout.finish == "stop", answers[rollout.prompt_uid], pattern)
    count = len(rollouts)
    return EvalReport(
        step=step,
        decoding=decoding.name,
        accuracy=correct / count,
        num_prompts=len(answers),
        mean_response_len=sum(rollout.response_len for rollout in rollouts) / count,
        finished=sum(rollout.finish == "stop" for rollout in rollouts) / count,
    )
