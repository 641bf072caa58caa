"""Compute the rewards of a rollout batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_tropd.grading.grader import Grader, Question
from megatron_tropd.grading.rewards import RewardFunction, RewardSample, exact_match
from megatron_tropd.parallel.fail_together import share_out
from megatron_tropd.types import Prompt, Rollout


class RewardError(RuntimeError):
    """A reward function failed; the message names the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarder:
    """A reward function, and what its samples are made from."""

    function: RewardFunction
    decode: Callable[[Sequence[int]], str]
    prompts: Mapping[int, Prompt]
    """By uid."""
    grader: Grader

    def rewards(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return one finite reward per rollout, on every rank.  Collective: each rank calls the function for its share.

        Raises:
            RewardError: on every rank, if any call failed or returned a number that is not finite.
        """
        return share_out(rollouts, self._share, RewardError)

    def _share(self, rollouts: Sequence[Rollout]) -> list[float]:
        samples = [self._sample(rollout) for rollout in rollouts]
        if self.function is exact_match:  # all workers of the rank at one time; the verdicts are remembered
            self.grader.all_right(
                [
                    Question(response=one.response, finished=one.finished, reference=one.answer, grader=one.grader.kind)
                    for one in samples
                    if one.answer is not None
                ]
            )
        return [self._reward(rollout, sample) for rollout, sample in zip(rollouts, samples, strict=True)]

    def _sample(self, rollout: Rollout) -> RewardSample:
        prompt = self.prompts[rollout.prompt_uid]
        return RewardSample(
            prompt=self.decode(prompt.token_ids),
            response=self.decode(rollout.token_ids[rollout.prompt_len :]),
            finished=rollout.finish == "stop",
            answer=prompt.answer,
            domain=prompt.domain,
            grader=self.grader.of_row(prompt.grader),
        )

    def _reward(self, rollout: Rollout, sample: RewardSample) -> float:
        where = f"--reward-function on prompt {rollout.prompt_uid}, sample {rollout.sample_index}"
        try:
            value = float(self.function(sample))
        except Exception as error:  # a user's function may fail in any way
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise ValueError(f"{where}: the reward is {value}; expected a finite number")
        return value
