"""Means over seeds, and paired differences between two methods with Student's confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

CONFIDENCE = 0.95


class Verdict(Enum):
    """What the seeds say of "the first is larger than the second"."""

    HOLDS = "holds"
    OPPOSITE = "does not hold"
    OPEN = "cannot be told"
    NOT_RUN = "not run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over seeds."""

    mean: float
    standard_error: float | None
    """Standard deviation (n - 1) over sqrt(n); None for one seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first less the second, over the seeds that both have."""

    mean: float
    half_width: float | None
    """Of the confidence interval, half its width; None for one seed."""
    seeds: int
    above: int
    """Seeds whose difference is above 0."""
    below: int

    @property
    def verdict(self) -> Verdict:
        """HOLDS where the interval lies above 0 and every seed does; OPPOSITE where both lie below; else OPEN."""
        if self.half_width is None:
            return Verdict.OPEN
        if self.mean - self.half_width > 0 and self.above == self.seeds:
            return Verdict.HOLDS
        if self.mean + self.half_width < 0 and self.below == self.seeds:
            return Verdict.OPPOSITE
        return Verdict.OPEN


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and standard error; at least one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(mean=mean, standard_error=None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Mean(mean=mean, standard_error=math.sqrt(variance / len(values)))


def difference_of(pairs: Sequence[tuple[float, float]]) -> Difference:
    """The paired difference, with the interval of a paired t test; one pair per seed, at least one."""
    differences = [first - second for first, second in pairs]
    whole = mean_of(differences)
    half_width = None
    if whole.standard_error is not None:
        half_width = t_quantile(0.5 + CONFIDENCE / 2, len(differences) - 1) * whole.standard_error
    return Difference(
        mean=whole.mean,
        half_width=half_width,
        seeds=len(differences),
        above=sum(value > 0 for value in differences),
        below=sum(value < 0 for value in differences),
    )


def t_quantile(probability: float, degrees: int) -> float:
    """The t below which Student's distribution has ``probability``, from 0.5 to below 1; ``degrees`` at least 1."""
    low, high = 0.0, 1.0
    while _t_below(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if _t_below(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _t_below(t: float, degrees: int) -> float:
    """P(T < t) for t >= 0: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for index in range(2 if odd else 1, degrees - 1, 2):
        term *= cosine * cosine * index / (index + 1)
        total += term
    if not odd:
        between = math.sin(angle) * total
    else:
        between = 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))
    return 0.5 + between / 2
