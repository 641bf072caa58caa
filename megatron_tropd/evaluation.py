"""Measure the accuracy of the student on prompts with known answers, for several ways of decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_tropd.grading.grader import Grader, Question
from megatron_tropd.grading.references import check_references
from megatron_tropd.grading.workers import GradingError
from megatron_tropd.parallel.fail_together import share_out
from megatron_tropd.reports import Accuracy, EvalReport
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


def check_prompts(prompts: Sequence[Prompt], grader: Grader) -> None:
    """Check that there are prompts, and that each has an answer that a response can give.

    Raises:
        ValueError: the message says what is wrong.
    """
    if not prompts:
        raise ValueError("no prompts to evaluate; check --eval-data")
    if without := [prompt.uid for prompt in prompts if prompt.answer is None]:
        raise ValueError(
            f"{len(without)} of {len(prompts)} evaluation prompts have no answer (first: uid {without[0]}); "
            "check --eval-data and --answer-key"
        )
    rows = ((prompt.uid, prompt.answer, prompt.grader) for prompt in prompts if prompt.answer is not None)
    if faults := check_references(rows, grader.kind):
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
        prompts: those that ``check_prompts`` accepts; it is not called here, since references may be long.
        tokenizer: turns responses into text; special tokens are left out.
        decodings: e.g. ``DECODINGS.values()``.
        grader: tells which responses are right, where a prompt names no other; with several ranks each grades its
            share of the responses.
        max_response_length: tokens; a response cut there counts as wrong.
        seed: seed of the sampling; the random numbers depend on ``step`` too and differ from those of training.
        step: number of training steps (rollout batches) done; goes into the reports.
        num_samples: responses per prompt, averaged (greedy decoding always writes one).

    Raises:
        EngineError: the engine cannot generate.
        GradingError: the responses cannot be graded.
    """
    by_uid = {prompt.uid: prompt for prompt in prompts}
    reports = []
    for decoding in decodings:
        params = SamplingParams(
            temperature=decoding.temperature, top_p=decoding.top_p, seed=seed, stream=Stream.EVALUATION, step=step
        )
        requests = _requests(prompts, num_samples if decoding.temperature > 0 else 1, max_response_length)
        rollouts = generate(requests, params)
        reports.append(_report(decoding, rollouts, by_uid, tokenizer, grader, step=step))
    return reports


def _report(
    decoding: Decoding, rollouts: Sequence[Rollout], prompts: Mapping[int, Prompt], tokenizer: PreTrainedTokenizerBase,
    grader: Grader, *, step: int,
) -> EvalReport:  # fmt: skip
    def question(rollout: Rollout) -> Question:
        prompt = prompts[rollout.prompt_uid]
        assert prompt.answer is not None  # check_prompts
        text = tokenizer.decode(list(rollout.token_ids[rollout.prompt_len :]), skip_special_tokens=True)
        return Question(
            response=str(text),
            finished=rollout.finish == "stop",
            reference=prompt.answer,
            grader=prompt.grader,
        )

    right = share_out(rollouts, lambda mine: grader.all_right([question(rollout) for rollout in mine]), GradingError)
    verdicts: dict[int, list[bool]] = {}
    for rollout, verdict in zip(rollouts, right, strict=True):
        verdicts.setdefault(rollout.prompt_uid, []).append(verdict)
    shares = {uid: sum(of_prompt) / len(of_prompt) for uid, of_prompt in verdicts.items()}
    by_domain: dict[str, list[float]] = {}
    for uid, share in shares.items():
        if domain := prompts[uid].domain:
            by_domain.setdefault(domain, []).append(share)
    whole, count = accuracy_of(list(shares.values())), len(rollouts)
    return EvalReport(
        step=step,
        decoding=decoding.name,
        accuracy=whole.accuracy,
        std_error=whole.std_error,
        num_prompts=whole.num_prompts,
        num_samples=count // len(shares),
        mean_response_len=sum(rollout.response_len for rollout in rollouts) / count,
        finished=sum(rollout.finish == "stop" for rollout in rollouts) / count,
        domains={domain: accuracy_of(by_domain[domain]) for domain in sorted(by_domain)},
    )


def accuracy_of(shares: Sequence[float]) -> Accuracy:
    """Return the accuracy over prompts, of each of which ``shares`` has the share of right responses.

    The standard error is that of a mean of independent questions: sqrt(sum (s_i - mean)^2 / (n - 1) / n).
    """
    count = len(shares)
    mean = math.fsum(shares) / count
    variance = math.fsum((share - mean) ** 2 for share in shares) / (count - 1) if count > 1 else 0.0
    return Accuracy(accuracy=mean, std_error=math.sqrt(variance / count), num_prompts=count)
