"""Group advantages: how much better a response is than the others to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Baseline = Literal["group-mean", "leave-one-out"]
STD_FLOOR = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Group advantages of a rollout batch."""

    values: list[float]
    """One per rollout."""
    num_groups: int
    num_flat: int
    """Groups whose rewards are all equal: their advantages are 0, so they have no gradient."""


def group_advantages(
    rewards: Sequence[float], groups: Sequence[int], *, baseline: Baseline, divide_by_std: bool
) -> Advantages:
    """Return A_i = (r_i - b_i) / (s + 1e-6) for each rollout i of a group of n >= 2 (GRPO, arXiv 2402.03300).

    ``group-mean``     b_i = mean of all n
    ``leave-one-out``  b_i = mean of the other n - 1 (RLOO, arXiv 2402.14740)
    s is the standard deviation of all n with n - 1 in its denominator; without ``divide_by_std`` A_i = r_i - b_i.
    A group of one has advantage 0.
    """
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    values, num_flat = [0.0] * len(rewards), 0
    for indices in members.values():
        of_group, count = [rewards[index] for index in indices], len(indices)
        if max(of_group) == min(of_group):
            num_flat += 1
            continue
        mean = math.fsum(of_group) / count
        std = math.sqrt(math.fsum((reward - mean) ** 2 for reward in of_group) / (count - 1))
        scale = 1.0 if baseline == "group-mean" else count / (count - 1)
        for index in indices:
            centred = scale * (rewards[index] - mean)  # r - mean of the others = n / (n - 1) (r - mean of all)
            values[index] = centred / (std + STD_FLOOR) if divide_by_std else centred
    return Advantages(values=values, num_groups=len(members), num_flat=num_flat)
