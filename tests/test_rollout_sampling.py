"""Sampling: the right distribution, the right nucleus, and one token per (logits, uniform)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd import rng
from megatron_tropd.rollout.embedded.sampling import nucleus, sample

PROBS = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])


def draw(probs: torch.Tensor, num: int, **settings_) -> torch.Tensor:
    uniforms = rng.uniform(rng.key(11, rng.Stream.SAMPLING, 0), torch.arange(num), torch.tensor(0))
    tokens, _ = sample(probs.log().expand(num, -1), uniforms, **settings_)
    return tokens


def chi_square(tokens: torch.Tensor, expected: torch.Tensor) -> float:
    observed = torch.bincount(tokens, minlength=len(expected)).double()
    assert observed[expected == 0].sum() == 0
    wanted = expected.double() * len(tokens)
    return float(((observed - wanted) ** 2 / wanted)[expected > 0].sum())


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_distribution_is_softmax_at_temperature(temperature):
    expected = torch.softmax(PROBS.log() / temperature, -1)
    tokens = draw(PROBS, 20000, temperature=temperature, top_p=1.0)
    assert chi_square(tokens, expected) < 18.5  # 99.9 % of chi-square with 4 degrees of freedom


def test_top_p_distribution_is_the_renormalised_nucleus():
    expected = torch.tensor([0, 0.4, 0, 0.3, 0]) / 0.7
    tokens = draw(PROBS, 20000, temperature=1.0, top_p=0.65)
    assert chi_square(tokens, expected) < 10.9  # 1 degree of freedom


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.01, [1]), (0.4, [1]), (0.41, [1, 3]), (0.71, [1, 2, 3]), (0.99, [0, 1, 2, 3, 4])],
)
def test_nucleus_keeps_the_crossing_token(top_p, kept):
    probs = torch.tensor([[0.05, 0.4, 0.15, 0.3, 0.1]], dtype=torch.float64)
    assert nucleus(probs, top_p)[0].nonzero().flatten().tolist() == kept


def test_nucleus_breaks_ties_by_id():
    probs = torch.full((1, 4), 0.25, dtype=torch.float64)
    assert nucleus(probs, 0.5)[0].tolist() == [True, True, False, False]


def test_greedy_takes_the_lowest_id_and_reports_temperature_1():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    tokens, logprobs = sample(logits, torch.tensor([0.9], dtype=torch.float64), 0.0, 1.0)
    assert tokens.tolist() == [1]
    assert logprobs.item() == pytest.approx(torch.log_softmax(logits.double(), -1)[0, 1].item(), abs=1e-12)


def test_logprob_is_of_the_full_vocabulary_at_the_temperature():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    uniforms = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    tokens, logprobs = sample(logits, uniforms, 0.7, 0.5)
    wanted = torch.log_softmax(logits.double() / 0.7, -1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1.0, 0.6]), st.sampled_from([1.0, 0.7]))
def test_a_row_does_not_see_the_others(seed, temperature, top_p):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 23, generator=generator) * 3
    uniforms = torch.rand(7, generator=generator, dtype=torch.float64)
    tokens, logprobs = sample(logits, uniforms, temperature, top_p)
    for row in range(7):
        alone, logprob = sample(logits[row : row + 1], uniforms[row : row + 1], temperature, top_p)
        assert alone.item() == tokens[row] and logprob.item() == logprobs[row]


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 1 - 2**-53, 1.0])
def test_extreme_uniforms_never_pick_a_token_of_probability_zero(uniform):
    logits = torch.tensor([[-5000.0, 1.0, 0.5, -5000.0]])
    tokens, _ = sample(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, 1.0)
    assert tokens.item() in (1, 2)


def test_columns_beyond_the_vocabulary_do_not_exist():
    logits = torch.tensor([[0.0, 1.0, 50.0]])
    tokens, logprobs = sample(logits, torch.tensor([0.999], dtype=torch.float64), 1.0, 1.0, vocab_size=2)
    assert tokens.item() == 1
    assert logprobs.item() == pytest.approx(float(torch.log_softmax(logits[0, :2].double(), -1)[1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_refused(bad, temperature):
    logits = torch.zeros(2, 4)
    logits[1, 2] = bad
    with pytest.raises(ValueError, match="row 1"):
        sample(logits, torch.full((2,), 0.5, dtype=torch.float64), temperature, 1.0)
