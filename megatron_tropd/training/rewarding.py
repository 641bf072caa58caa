"""Compute the rewards of a rollout batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_tropd.grading.grader import Grader
from megatron_tropd.grading.rewards import RewardFunction, RewardSample
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
        return share_out(rollouts, self._reward, RewardError)

    def _reward(self, rollout: Rollout) -> float:
        prompt = self.prompts[rollout.prompt_uid]
        sample = RewardSample(
            prompt=self.decode(prompt.token_ids),
            response=self.decode(rollout.token_ids[rollout.prompt_len :]),
            finished=rollout.finish == "stop",
            answer=prompt.answer,
            domain=prompt.domain,
            grader=self.grader,
        )
        where = f"--reward-function on prompt {rollout.prompt_uid}, sample {rollout.sample_index}"
        try:
            value = float(self.function(sample))
        except Exception as error:  # a user's function may fail in any way
            raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise ValueError(f"{where}: the reward is {value}; expected a finite number")
        return value
