"""Means over questions with their standard errors, and the paired bootstrap between two models.

A benchmark is a sample of questions, so the unit is the question: the samples of a question are averaged first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 10_000
_CHUNK = 1 << 22
"""Drawn indices at a time, which bounds the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over questions."""

    mean: float
    standard_error: float | None
    """Standard deviation (n - 1) of the questions' means over sqrt(n); None for a single question."""
    num_questions: int


def estimate(samples: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean over questions of the mean over their samples.

    Args:
        samples: scores of each question's samples, at least one each.

    Raises:
        ValueError: there is no question, or one without samples.
    """
    means = question_means(samples)
    mean = math.fsum(means) / len(means)
    error = None
    if len(means) > 1:
        variance = math.fsum((value - mean) ** 2 for value in means) / (len(means) - 1)
        error = math.sqrt(variance / len(means))
    return Estimate(mean=mean, standard_error=error, num_questions=len(means))


def question_means(samples: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean over each question's samples; errors as :func:`estimate`."""
    if not samples or not all(samples):
        raise ValueError("a mean needs at least one question, and each question at least one sample")
    return [math.fsum(scores) / len(scores) for scores in samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Difference of two models over the same questions."""

    difference: float
    """Mean of the first less that of the second."""
    low: float
    """2.5% quantile of the resampled differences."""
    high: float
    """97.5% quantile."""
    p_value: float
    """Two-sided: twice the smaller share of resampled differences on either side of 0, at most 1; the observed one is
    counted among them, so that it is never 0."""


def paired_bootstrap(
    pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES
) -> Comparison:
    """Compare two models on one or several benchmarks.

    The questions of each benchmark are drawn with replacement, the same for both models; the difference is the mean
    over benchmarks of the mean over their questions.

    Args:
        pairs: benchmark -> means over samples of the first and of the second model, for the same questions in order.
        seed: of the draws.
        num_resamples: how often the questions are drawn.

    Raises:
        ValueError: a benchmark's two lists differ in length or are empty.
    """
    generator = np.random.default_rng(seed)
    observed, resampled = [], np.zeros(num_resamples)
    for name, (first, second) in pairs.items():
        if len(first) != len(second) or not first:
            raise ValueError(f"{name}: {len(first)} and {len(second)} questions; expected the same questions twice")
        differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
        observed.append(float(differences.mean()))
        resampled += _resampled_means(differences, generator, num_resamples) / len(pairs)
    low, high = np.quantile(resampled, [0.025, 0.975])
    tiny = 1e-12  # what rounding alone takes off zero is on both sides of it
    sides = int((resampled <= tiny).sum()), int((resampled >= -tiny).sum())
    return Comparison(
        difference=math.fsum(observed) / len(observed),
        low=float(low),
        high=float(high),
        p_value=min(1.0, 2 * (1 + min(sides)) / (1 + num_resamples)),
    )


def _resampled_means(
    differences: NDArray[np.float64], generator: np.random.Generator, num_resamples: int
) -> NDArray[np.float64]:
    """Means of ``num_resamples`` draws with replacement of all questions, float64 [num_resamples]."""
    count = len(differences)
    per_chunk = max(1, _CHUNK // count)
    parts = []
    for start in range(0, num_resamples, per_chunk):
        rows = min(per_chunk, num_resamples - start)
        parts.append(differences[generator.integers(0, count, (rows, count))].mean(axis=1))
    return np.concatenate(parts)
