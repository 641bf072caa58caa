"""Compare two models over the same questions."""

from __future__ import annotations

from pathlib import Path

from megatron_tropd.benchmarks.results import CONFIG, Result, read_results
from megatron_tropd.benchmarks.statistics import NUM_RESAMPLES, Comparison, paired_bootstrap, question_means
from megatron_tropd.json_files import read_json_object


def compare(first: Path, second: Path, *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> dict[str, Comparison]:
    """Return the difference of two runs on each benchmark that both have and, if these are several, on their ``mean``.

    Raises:
        ValueError: they have no benchmark in common, or one of other questions, or of another protocol.
    """
    runs = read_results(first), read_results(second)
    common = [name for name in runs[0] if name in runs[1]]
    if not common:
        raise ValueError(f"{first} has {', '.join(runs[0])}, {second} has {', '.join(runs[1])}: nothing to compare")
    _check_settings(first, second, common)
    pairs = {name: _pair(runs[0][name], runs[1][name], first, second) for name in common}
    found = {
        name: paired_bootstrap({name: pair}, seed=seed, num_resamples=num_resamples) for name, pair in pairs.items()
    }
    if len(pairs) > 1:
        found["mean"] = paired_bootstrap(pairs, seed=seed, num_resamples=num_resamples)
    return found


def _pair(one: Result, other: Result, first: Path, second: Path) -> tuple[list[float], list[float]]:
    ids = [question.question for question in one.questions]
    if ids != [question.question for question in other.questions]:
        raise ValueError(f"{one.benchmark}: {first} and {second} have other questions, or another order of them")
    return question_means(one.samples()), question_means(other.samples())


def _check_settings(first: Path, second: Path, common: list[str]) -> None:
    """Check that both were asked and graded in one way; the number of samples may differ."""
    configs = [read_json_object(output / CONFIG).get("benchmarks", {}) for output in (first, second)]
    for name in common:
        one, other = (config.get(name, {}) for config in configs)
        differing = [key for key in {*one, *other} - {"samples"} if one.get(key) != other.get(key)]
        if differing:
            told = "; ".join(f"{key}: {one.get(key)!r} and {other.get(key)!r}" for key in sorted(differing))
            raise ValueError(f"{name}: {first} and {second} were not measured in the same way: {told}")
