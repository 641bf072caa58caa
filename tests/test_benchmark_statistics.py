"""Standard errors over questions and the paired bootstrap, against numpy and against all resamples there are."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_tropd.benchmarks import statistics
from megatron_tropd.benchmarks.statistics import estimate, paired_bootstrap

FIRST, SECOND = [1.0, 0.5, 0.25, 1.0, 0.0], [0.5, 0.75, 0.0, 0.0, 0.25]


def every_mean(differences):
    """The mean of every resample of these questions, each as likely as any other."""
    return np.array([np.mean(draw) for draw in itertools.product(differences, repeat=len(differences))])


def test_the_standard_error_is_over_questions_not_over_samples():
    samples = [[1, 0, 1, 1], [0, 0], [1, 1, 1, 1], [0, 1]]
    means = np.array([0.75, 0, 1, 0.5])
    found = estimate(samples)
    assert found.mean == pytest.approx(means.mean(), abs=1e-15)
    assert found.standard_error == pytest.approx(means.std(ddof=1) / 2, abs=1e-15)
    assert found.num_questions == 4
    flat = np.concatenate([np.array(scores, dtype=float) for scores in samples])
    assert abs(found.standard_error - flat.std(ddof=1) / math.sqrt(len(flat))) > 0.05  # another number


def test_one_question_has_no_standard_error():
    assert estimate([[1, 0]]).standard_error is None
    with pytest.raises(ValueError, match="at least one question"):
        estimate([])
    with pytest.raises(ValueError, match="at least one sample"):
        estimate([[1.0], []])


def test_the_bootstrap_agrees_with_all_resamples():
    means = every_mean(np.subtract(FIRST, SECOND))
    found = paired_bootstrap({"aime24": (FIRST, SECOND)}, num_resamples=200_000)
    assert found.difference == pytest.approx(np.mean(FIRST) - np.mean(SECOND), abs=1e-15)
    exact = min(1.0, 2 * min((means <= 1e-12).mean(), (means >= -1e-12).mean()))
    assert 0.1 < exact < 0.9
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.051)  # one step between two possible means
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.051)


def test_the_mean_over_benchmarks_draws_each_one_by_itself():
    other = [1.0, 1.0, 0.0], [0.0, 1.0, 0.5]
    sets = [every_mean(np.subtract(FIRST, SECOND)), every_mean(np.subtract(*other))]
    means = (sets[0][:, None] + sets[1][None, :]).ravel() / 2
    found = paired_bootstrap({"aime24": (FIRST, SECOND), "amc23": other}, num_resamples=200_000)
    assert found.difference == pytest.approx(means.mean(), abs=1e-12)
    assert found.p_value == pytest.approx(2 * (means <= 1e-12).mean(), abs=0.01)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.02)


def test_pairing_matters_and_equal_models_do_not_differ():
    shuffled = [SECOND[i] for i in (3, 0, 4, 1, 2)]
    paired, other = (paired_bootstrap({"a": (FIRST, second)}) for second in (SECOND, shuffled))
    assert paired.difference == pytest.approx(other.difference)
    assert (paired.low, paired.high) != (other.low, other.high)
    same = paired_bootstrap({"a": (FIRST, FIRST)})
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_a_seed_gives_the_same_numbers_in_any_chunks(monkeypatch):
    pairs = {"a": (FIRST, SECOND)}
    once = paired_bootstrap(pairs, seed=3)
    assert once == paired_bootstrap(pairs, seed=3) != paired_bootstrap(pairs, seed=4)
    monkeypatch.setattr(statistics, "_CHUNK", 1000)
    assert paired_bootstrap(pairs, seed=3) == once


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="aime24: 5 and 4 questions"):
        paired_bootstrap({"aime24": (FIRST, SECOND[:4])})
