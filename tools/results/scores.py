"""A score of a method: its mean, and two standard errors that answer two questions.

Over questions: what would other questions of the same kind give these very models?  Over seeds: what would another
training run give on these very questions?
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_tropd.benchmarks.results import Result
from megatron_tropd.benchmarks.statistics import estimate, question_means
from megatron_tropd.reporting.records import Record
from megatron_tropd.reporting.report.plots import standard_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A mean over seeds, as a share."""

    mean: float
    over_questions: float | None
    """Standard error over questions or prompts; None where it is not known."""
    over_seeds: float | None
    """Standard error over seeds; None for a single seed."""
    by_seed: dict[str, float]
    num_questions: int


def benchmark_score(results: Mapping[str, Result]) -> Score:
    """The score of a method on one benchmark.

    The seeds of a question are averaged first, like its samples, so that the standard error over questions is that of
    the mean over seeds.

    Args:
        results: seed -> what its model got.

    Raises:
        ValueError: the seeds were asked other questions.
    """
    questions = [[question.question for question in result.questions] for result in results.values()]
    if any(other != questions[0] for other in questions[1:]):
        raise ValueError(f"{', '.join(results)} were asked other questions")
    means = [question_means(result.samples()) for result in results.values()]
    pooled = estimate(list(zip(*means, strict=True)))
    by_seed = {seed: fmean(values) for seed, values in zip(results, means, strict=True)}
    return Score(
        mean=pooled.mean, over_questions=pooled.standard_error, over_seeds=_over_seeds(by_seed), by_seed=by_seed,
        num_questions=pooled.num_questions,
    )  # fmt: skip


def evaluation_score(records: Mapping[str, Record]) -> Score:
    """The accuracy of a method in evaluations of ``--eval-data``.

    A record has no answers to single prompts, so the standard error over prompts is the mean of the seeds' own: what
    it would be if the seeds were right on the same prompts, and at least what it is.

    Args:
        records: seed -> its last evaluation.
    """
    by_seed = {seed: float(record["accuracy"]) for seed, record in records.items()}
    errors = [standard_error(record) for record in records.values()]
    return Score(
        mean=fmean(by_seed.values()),
        over_questions=fmean(errors) if all(map(math.isfinite, errors)) else None,
        over_seeds=_over_seeds(by_seed),
        by_seed=by_seed,
        num_questions=min(int(record["num_prompts"]) for record in records.values()),
    )


def mean_score(scores: Sequence[Score]) -> Score | None:
    """The mean over benchmarks, which are independent sets of questions; None where seeds lack some of them."""
    if not scores or any(score.by_seed.keys() != scores[0].by_seed.keys() for score in scores):
        return None
    by_seed = {seed: fmean(score.by_seed[seed] for score in scores) for seed in scores[0].by_seed}
    errors = [score.over_questions for score in scores if score.over_questions is not None]
    return Score(
        mean=fmean(score.mean for score in scores),
        over_questions=math.hypot(*errors) / len(scores) if len(errors) == len(scores) else None,
        over_seeds=_over_seeds(by_seed),
        by_seed=by_seed,
        num_questions=sum(score.num_questions for score in scores),
    )


def _over_seeds(by_seed: Mapping[str, float]) -> float | None:
    return estimate([[value] for value in by_seed.values()]).standard_error


def score_text(score: Score) -> str:
    """A score in percent: ``38.54 +- 7.12 q``, and with several seeds ``38.54 +- 1.20 s +- 7.12 q``."""
    parts = [f"{100 * score.mean:.2f}"]
    for error, unit in ((score.over_seeds, "s"), (score.over_questions, "q")):
        if error is not None:
            parts.append(f"+- {100 * error:.2f} {unit}")
    return " ".join(parts)
