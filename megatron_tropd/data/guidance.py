"""Prefix guidance: how many tokens of the teacher's response the student is given to continue.

The student continues from the first ``guidance_len`` tokens of the teacher's response; the length is
annealed to zero over ``steps`` (TrOPD, arXiv 2606.01249; the ambiguities of the paper are switches).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import torch

from megatron_tropd import rng
from megatron_tropd.types import GenerationRequest, Prompt, Rollout

Mode = Literal["none", "ratio", "cap", "uniform"]
Schedule = Literal["half-cosine", "quarter-cosine", "linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidanceConfig:
    """Length of the teacher prefix over the steps of a run.

    L_T is the length of the teacher's response with its stop token, L_max is --max-response-length.
    """

    mode: Mode = "none"
    """none: no prefix; ratio: floor(alpha L_T); cap: min(L_T, floor(alpha L_max)); uniform: U{0..cap}."""
    schedule: Schedule = "half-cosine"
    steps: int = 200
    """T, the number of steps over which alpha goes from 1 to 0; afterwards it is 0."""
    beta: float = 0.001
    """Weight of the imitation loss on the prefix; read by the objective."""


def check_guidance(config: GuidanceConfig, *, num_prompts: int, num_responses: int, min_share: float) -> list[str]:
    """Return the errors of the configuration; [] if it can be run.

    Args:
        config: of the guidance.
        num_prompts: prompts of the data.
        num_responses: those that have a teacher's response.
        min_share: least share of prompts with a response (--min-response-share).
    """
    errors = []
    if config.mode not in get_args(Mode):
        errors.append(f"--guidance {config.mode!r}: expected one of {', '.join(get_args(Mode))}")
    if config.schedule not in get_args(Schedule):
        errors.append(f"--guidance-schedule {config.schedule!r}: expected one of {', '.join(get_args(Schedule))}")
    if not (math.isfinite(config.beta) and config.beta >= 0):
        errors.append(f"--guidance-beta {config.beta}: expected a finite number, 0 or more")
    if config.mode == "none":
        return errors
    if config.steps < 1:
        errors.append(f"--guidance-steps {config.steps}: expected at least 1 (or --guidance none)")
    if not num_responses or num_responses < min_share * num_prompts:
        has = (
            f"{num_responses} of the {num_prompts} prompts have one"
            if num_responses
            else (f"none of the {num_prompts} prompts has one")
        )
        errors.append(
            f"--guidance {config.mode} needs teacher responses, but {has} (--min-response-share {min_share:g}): "
            "give their key by --response-key, add them to --prompt-data, or use --guidance none"
        )
    return errors


def alpha(schedule: Schedule, step: int, total: int) -> float:
    """Return the share of the prefix that is left at ``step`` (counted from 0): 1 at 0, 0 from ``total`` on."""
    if step >= total:
        return 0.0
    match schedule:
        case "half-cosine":
            return (1 + math.cos(math.pi * step / total)) / 2
        case "quarter-cosine":
            return math.cos(math.pi * step / (2 * total))
        case "linear":
            return (total - step) / total
        case _:
            assert_never(schedule)


def prefix_length(config: GuidanceConfig, step: int, teacher_len: int, max_response_length: int, u: float) -> int:
    """Return how many tokens of the teacher's response to give at ``step``.

    Args:
        config: mode and schedule.
        step: steps done before this one.
        teacher_len: L_T, the stop token included.
        max_response_length: L_max.
        u: a uniform number in [0, 1), read by mode ``uniform`` only.

    Returns:
        0 <= length <= min(L_T, L_max) - 1, so the stop token is not given and at least one token is left to write;
        0 if there is no response (L_T = 0).
    """
    share = alpha(config.schedule, step, config.steps)
    cap = min(teacher_len, math.floor(share * max_response_length))
    match config.mode:
        case "none":
            length = 0
        case "ratio":
            length = math.floor(share * teacher_len)
        case "cap":
            length = cap
        case "uniform":
            length = min(math.floor(u * (cap + 1)), cap)
        case _:
            assert_never(config.mode)
    return max(0, min(length, teacher_len - 1, max_response_length - 1))


def attach(
    prompts: Sequence[Prompt],
    step: int,
    config: GuidanceConfig,
    *,
    seed: int,
    n_samples_per_prompt: int,
    max_response_length: int,
) -> list[GenerationRequest]:
    """Return the generation requests of one step, prompt by prompt.

    All samples of a prompt share one prefix.  If a prompt occurs twice (at the end of one epoch and the start of the
    next), its sample numbers continue: every request of a step then has its own (prompt uid, sample index), hence its
    own random numbers, and the prefix still counts once.

    Raises:
        ValueError: ``n_samples_per_prompt`` or ``max_response_length`` is below 1.
    """
    if n_samples_per_prompt < 1 or max_response_length < 1:
        raise ValueError(
            f"--n-samples-per-prompt {n_samples_per_prompt} and --max-response-length {max_response_length} "
            "must both be at least 1"
        )
    draws = _draws(prompts, rng.key(seed, rng.Stream.GUIDANCE, step))
    next_sample: Counter[int] = Counter()
    requests = []
    for prompt, u in zip(prompts, draws, strict=True):
        response = prompt.teacher_response_ids or ()
        length = prefix_length(config, step, prompt.whole_response_len, max_response_length, u)
        first = next_sample[prompt.uid]
        next_sample[prompt.uid] += n_samples_per_prompt
        requests += [
            GenerationRequest(
                prompt_uid=prompt.uid,
                sample_index=first + index,
                token_ids=prompt.token_ids + response[:length],
                prompt_len=len(prompt.token_ids),
                guidance_len=length,
                max_new_tokens=max_response_length - length,
            )
            for index in range(n_samples_per_prompt)
        ]
    return requests


def whole_responses(prompts: Sequence[Prompt], weight_version: int, *, scored: bool = False) -> list[Rollout]:
    """Return rollouts that nobody has to write: each prompt with its response, stop token included unless the response
    was cut.  For supervised finetuning the response is guidance; where a teacher scores it (``scored``) its tokens
    stand where those that the student wrote do, with a log-probability of 0.

    Raises:
        ValueError: a prompt has no response.
    """
    rollouts = []
    for prompt in prompts:
        if not prompt.teacher_response_ids:
            raise ValueError(f"prompt {prompt.uid} has no response to learn from; see --response-key")
        length = len(prompt.teacher_response_ids)
        rollouts.append(
            Rollout(
                prompt_uid=prompt.uid,
                sample_index=0,  # also for a prompt that occurs twice: each copy counts
                token_ids=prompt.token_ids + prompt.teacher_response_ids,
                prompt_len=len(prompt.token_ids),
                guidance_len=0 if scored else length,
                logprobs=(0.0,) * length if scored else (),
                weight_version=(weight_version, weight_version),
                finish="length" if prompt.is_cut else "stop",
            )
        )
    return rollouts


def _draws(prompts: Sequence[Prompt], stream_key: int) -> list[float]:
    """Return one uniform number per prompt, keyed by its sample 0 and position 0."""
    uids = torch.tensor([rng.sample_uid(prompt.uid, 0) for prompt in prompts], dtype=torch.int64)
    draws: list[float] = rng.uniform(stream_key, uids, torch.zeros_like(uids)).tolist()
    return draws
