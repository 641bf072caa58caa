"""What the mathematics promises of the objectives, on random states with hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.objectives.diagnostics import GRADIENT_REGIONS, only_region, region_masks
from megatron_tropd.objectives.importance import Importance, policy_gradient
from megatron_tropd.objectives.methods import METHODS, ObjectiveSettings, make_objective
from megatron_tropd.types import Needs, Region, StepContext
from tests.dense import dense_stats, make_streams, random_batch

CONTEXT = StepContext(step=40, num_steps=200, entropy_threshold=0.9)


@st.composite
def states(draw):
    """(student logits, teacher logits) [V] of one state."""
    vocab = draw(st.integers(2, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))
    student, teacher = (torch.randn(vocab, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student, student if draw(st.integers(0, 9)) == 0 else teacher


def every_token(state, method, **numbers):
    """The objective on every token of the vocabulary in one state: (p, q, losses, their gradients [V, V], trust)."""
    student, teacher = state
    vocab = len(student)
    logits, rows = student.repeat(vocab, 1).requires_grad_(), teacher.repeat(vocab, 1)
    log_q = teacher.log_softmax(-1)
    blank, _ = make_streams(num_tokens=vocab, vocab_size=vocab, top_k=0, regions=[Region.ON_POLICY] * vocab)
    top_k = numbers.setdefault("top_k", min(3, vocab))
    values, ids = log_q.topk(top_k)
    tokens = replace(
        blank, label_T=torch.arange(vocab), teacher_logprob_T=log_q, teacher_topk_ids_TK=ids.repeat(vocab, 1),
        teacher_topk_logprob_TK=values.repeat(vocab, 1), reference_logprob_T=torch.full((vocab,), -2.0).double(),
    )  # fmt: skip
    objective = make_objective(method, ObjectiveSettings(**numbers))
    stats = dense_stats(logits, rows, tokens, objective.needs)
    losses = objective(stats, tokens, CONTEXT).token_loss_T
    (grads,) = torch.autograd.grad(losses.sum(), logits)
    return student.softmax(-1), log_q.exp(), losses.detach(), grads, objective.trust(stats, tokens, CONTEXT)


def check(test):
    return settings(max_examples=40, deadline=None, derandomize=True)(given(state=states())(test))


@check
def test_expected_k1_gradient_is_the_reverse_kl_gradient(state):
    p, _, _, k1, _ = every_token(state, "opd")
    exact = every_token(state, "full_rkl")[3]
    torch.testing.assert_close(p @ k1, exact[0], atol=1e-10, rtol=1e-10)
    with_baseline = every_token(state, "vopd")[3]
    torch.testing.assert_close(p @ with_baseline, exact[0], atol=1e-10, rtol=1e-10)


@check
def test_forward_kl_as_a_reward_has_zero_mean_gradient(state):
    p, _, _, grads, _ = every_token(state, "fkl_reward")
    torch.testing.assert_close(p @ grads, torch.zeros_like(p), atol=1e-10, rtol=0)


@check
def test_acceptance_is_one_minus_total_variation(state):
    p, q, _, _, weight = every_token(state, "tropd", gate="expected")
    assert float(p @ weight) == pytest.approx(1 - 0.5 * float((p - q).abs().sum()), abs=1e-12)


@check
def test_the_expected_gate_bounds_k1_by_one_over_e(state):
    _, _, losses, _, _ = every_token(state, "tropd_mask", gate="expected")
    assert float(losses.max()) <= 1 / math.e + 1e-12


@check
def test_renormalising_the_teacher_only_rescales_the_gradient(state):
    _, q, _, raw, _ = every_token(state, "fkl")
    renorm = every_token(state, "fkl", fkl_support="renorm")[3]
    mass = q.topk(min(3, len(q))).values.sum()
    torch.testing.assert_close(raw, mass * renorm, atol=1e-10, rtol=1e-10)


@check
def test_top_k_forward_kl_over_the_whole_vocabulary_is_exact_and_the_tail_is_a_lower_bound(state):
    exact = every_token(state, "full_fkl")
    for support in ("raw", "renorm", "renorm_both"):
        ours = every_token(state, "fkl", fkl_support=support, top_k=len(state[0]))
        torch.testing.assert_close(ours[2], exact[2], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(ours[3], exact[3], atol=1e-9, rtol=1e-9)
    tail = every_token(state, "fkl", fkl_support="tail")[2]
    assert (tail >= -1e-9).all() and (tail <= exact[2] + 1e-9).all()


@check
def test_soft_bounds_of_jsd_and_topd(state):
    assert float(every_token(state, "topd")[2].max()) <= -math.log(0.8) + 1e-12
    p, q, losses, _, _ = every_token(state, "jsd", top_k=1)
    m = 0.5 * (p + q)
    best = q.argmax()
    first = 0.5 * q[best] * (q[best] / m[best]).log()
    assert float((losses - first).max()) <= 0.5 * math.log(2) + 1e-9


@check
def test_methods_that_are_limits_of_others(state):
    opd = every_token(state, "opd")[3]
    for method, numbers in {
        "gopd": {"gopd_lambda": 1.0}, "aopd": {"gate_margin": -1.0}, "tropd": {"gate": "none"},
        "clip_outlier": {"outlier_threshold": -1e4}, "mask_outlier": {"outlier_threshold": -1e4},
    }.items():  # fmt: skip
        torch.testing.assert_close(every_token(state, method, **numbers)[3], opd, atol=1e-10, rtol=1e-10)
    aopd = every_token(state, "aopd")[3]
    positive = every_token(state, "tropd", gate="threshold", outlier_threshold=-1e-300)[3]
    distinct = (state[0].log_softmax(-1) - state[1].log_softmax(-1)).abs() > 1e-9
    torch.testing.assert_close(aopd[distinct], positive[distinct], atol=1e-10, rtol=1e-10)


def _corrected(correction, gap, advantage=1.5, **numbers):
    """(value, gradient by log p) of PG(advantage) where the engine's log-probability is ``gap`` below the trainer's."""
    batch = random_batch(num_tokens=1, vocab_size=5, top_k=2, seed=0)[2]
    logprob = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    stats = dense_stats(torch.zeros(1, 5).double(), torch.zeros(1, 5).double(), batch, Needs())
    tokens = replace(
        batch, region_T=torch.tensor([Region.ON_POLICY], dtype=torch.uint8),
        rollout_logprob_T=logprob.detach() - gap, **numbers.pop("streams", {}),
    )  # fmt: skip
    loss = policy_gradient(
        torch.tensor([advantage], dtype=torch.float64), replace(stats, logprob_T=logprob), tokens,
        Importance(correction=correction, **numbers),
    )  # fmt: skip
    return loss.item(), torch.autograd.grad(loss.sum(), logprob)[0].item()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(gap=st.floats(-5, 5), advantage=st.floats(-10, 10))
def test_importance_corrections_and_their_limits(gap, advantage):
    ratio = math.exp(gap)
    calm = {"streams": {"sequence_error_T": torch.tensor([1.5])}}
    near = {"abs": 1e-9, "rel": 1e-9}
    for correction, weight, numbers in [
        ("off", 1.0, {}), ("tis", min(ratio, 2.0), {}), ("tis", ratio, {"tis_cap": 1e9}),
        ("icepop", ratio, {"icepop_low": 0.0, "icepop_high": 1e9}),
        ("icepop", ratio if 0.5 <= ratio <= 5.0 else 0.0, {}),
        ("seq_err", ratio, calm), ("seq_err", 0.0, {**calm, "sequence_error_max": 1.4}),
    ]:  # fmt: skip
        value, gradient = _corrected(correction, gap, advantage, **dict(numbers))
        assert value == pytest.approx(-weight * advantage, **near)
        assert gradient == pytest.approx(-weight * advantage, **near)
    if gap == 0.0:
        assert len({_corrected(kind, 0.0, advantage) for kind in ("off", "tis", "icepop")}) == 1


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "value", "gradient"),
    [
        (math.log(1.1), 1.0, -1.1, -1.1),
        (math.log(1.5), 1.0, -1.28, 0.0),  # clip-higher: 1 + 0.28
        (math.log(1.5), -1.0, 1.5, 1.5),  # pushed back: never clipped
        (math.log(0.5), 1.0, -0.5, -0.5),
        (math.log(0.5), -1.0, 0.8, 0.0),
    ],
)
def test_ppo_clips_the_side_that_the_advantage_pushes_to(log_ratio, advantage, value, gradient):
    streams = {"old_logprob_T": torch.tensor([-1.0 - log_ratio], dtype=torch.float64)}
    found = _corrected("off", 0.3, advantage, clip_high=0.28, streams=streams)
    assert found == pytest.approx((value, gradient), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_regions_add_up_to_the_whole_gradient(method):
    logits, teacher, tokens = random_batch(num_tokens=80, vocab_size=31, top_k=5, seed=4, scale=8.0)
    logits.requires_grad_()
    objective = make_objective(method, ObjectiveSettings(top_k=5))
    stats = dense_stats(logits, teacher, tokens, objective.needs)

    def gradient(of):
        out = of(stats, tokens, CONTEXT)
        return out, torch.autograd.grad(out.token_loss_T.sum(), logits, retain_graph=True)[0]

    whole, whole_grad = gradient(objective)
    total = torch.zeros_like(whole_grad)
    for region in GRADIENT_REGIONS:
        out, grad = gradient(only_region(objective, region))
        assert out.metrics == {} and only_region(objective, region).needs == objective.needs
        assert out.denominator is None or int(out.denominator) == int(whole.denominator)
        total += grad
    torch.testing.assert_close(total, whole_grad, atol=1e-12, rtol=1e-12)
    masks = region_masks(objective, stats, tokens, CONTEXT)
    read = (tokens.region_T == Region.ON_POLICY) | (tokens.region_T == Region.GUIDANCE)
    assert torch.equal(torch.stack([masks[region] for region in GRADIENT_REGIONS]).sum(0), read.long())
    if objective.needs.teacher and method != "aopd":  # AOPD trusts nothing that is negative
        assert all(mask.any() for mask in masks.values()), {name: int(mask.sum()) for name, mask in masks.items()}


def test_regions_of_a_hard_gate_are_its_own_decision():
    logits, teacher, tokens = random_batch(num_tokens=200, vocab_size=31, top_k=5, seed=4)
    for method, trusted in {
        "mask_outlier": lambda reward: reward > -1.72,
        "aopd": lambda reward: reward > 0,
        "opd": lambda reward: tokens.uniform_T < reward.exp(),
    }.items():
        objective = make_objective(method, ObjectiveSettings(top_k=5))
        stats = dense_stats(logits, teacher, tokens, objective.needs)
        masks = region_masks(objective, stats, tokens, CONTEXT)
        expected = (tokens.region_T == Region.ON_POLICY) & trusted(tokens.teacher_logprob_T - stats.logprob_T)
        assert torch.equal(masks["trusted_positive"] | masks["trusted_negative"], expected), method


def test_several_minibatches_and_sequence_errors_ask_for_old_logprobs():
    for numbers in ({"num_minibatches": 4}, {"importance_correction": "seq_err"}):
        for method in METHODS:
            needs = make_objective(method, ObjectiveSettings(**numbers)).needs
            assert needs.old_logprob == needs.rollouts, method
    assert not make_objective("tropd", ObjectiveSettings(importance_correction="tis")).needs.old_logprob


def test_grpo_is_the_mean_over_samples_of_token_means():
    logits, teacher, tokens = random_batch(num_tokens=50, vocab_size=31, top_k=5, seed=9)
    tokens = replace(tokens, region_T=tokens.region_T.masked_fill(tokens.region_T == Region.GUIDANCE, Region.PROMPT))
    objective = make_objective("grpo", ObjectiveSettings(importance_correction="off"))
    out = objective(dense_stats(logits, teacher, tokens, objective.needs), tokens, CONTEXT)
    written = tokens.region_T == Region.ON_POLICY
    samples = [written & (tokens.sample_uid_T == uid) for uid in tokens.sample_uid_T.unique()]
    means = [-tokens.advantage_T[mask].mean() for mask in samples if mask.any()]
    assert int(out.denominator) == len(means) > 3
    assert float(out.token_loss_T.sum() / out.denominator) == pytest.approx(float(torch.stack(means).mean()), abs=1e-12)
