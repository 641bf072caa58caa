"""Measure the accuracy of the student on prompts with known answers, for several ways of decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.grading.grader import Grader, check_references
from megatron_tropd.grading.math_process import GradingError
from megatron_tropd.parallel.fail_together import share_out
from megatron_tropd.reports import EvalReport
from megatron_tropd.rng import Stream
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import GenerationRequest, Prompt, Rollout

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


def _check(prompts: Sequence[Prompt], grader: Grader) -> None:
    if not prompts:
        raise ValueError("no prompts to evaluate; check --eval-data")
    if without := [prompt.uid for prompt in prompts if prompt.answer is None]:
        raise ValueError(
            f"{len(without)} of {len(prompts)} evaluation prompts have no answer (first: uid {without[0]}); "
            "check --eval-data and --answer-key"
        )
    if faults := check_references(((p.uid, p.answer) for p in prompts if p.answer is not None), grader.kind):
        raise ValueError("; ".join(f"{fault}; check --eval-data and --answer-key" for fault in faults))


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
    grader: Grader,
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
        grader: tells which responses are right; with several ranks each grades its share of the responses.
        max_response_length: tokens; a response cut there counts as wrong.
        seed: seed of the sampling; the random numbers depend on ``step`` too and differ from those of training.
        step: number of training steps (rollout batches) done; goes into the reports.
        num_samples: responses per prompt, averaged (greedy decoding always writes one).

    Raises:
        ValueError: there are no prompts, or a prompt has no answer or one that no response can give.
        EngineError: the engine cannot generate.
        GradingError: the responses cannot be graded.
    """
    _check(prompts, grader)
    answers = {prompt.uid: prompt.answer for prompt in prompts if prompt.answer is not None}
    reports = []
    for decoding in decodings:
        params = SamplingParams(
            temperature=decoding.temperature, top_p=decoding.top_p, seed=seed, stream=Stream.EVALUATION, step=step
        )
        requests = _requests(prompts, num_samples if decoding.temperature > 0 else 1, max_response_length)
        rollouts = generate(requests, params)
        reports.append(_report(decoding, rollouts, answers, tokenizer, grader, step=step))
    return reports


def _report(
    decoding: Decoding, rollouts: Sequence[Rollout], answers: dict[int, str], tokenizer: PreTrainedTokenizerBase,
    grader: Grader, *, step: int,
) -> EvalReport:  # fmt: skip
    def right(rollout: Rollout) -> bool:
        text = tokenizer.decode(list(rollout.token_ids[rollout.prompt_len :]), skip_special_tokens=True)
        return grader.right(str(text), rollout.finish == "stop", answers[rollout.prompt_uid])

    count = len(rollouts)
    return EvalReport(
        step=step,
        decoding=decoding.name,
        accuracy=sum(share_out(rollouts, right, GradingError)) / count,
        num_prompts=len(answers),
        mean_response_len=sum(rollout.response_len for rollout in rollouts) / count,
        finished=sum(rollout.finish == "stop" for rollout in rollouts) / count,
    )
