"""Every method against a dense float64 oracle on random batches, and over any partition of their labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tropd.objectives.methods import METHODS, ObjectiveSettings, make_objective
from megatron_tropd.types import Region, StepContext
from tests.dense import dense_stats, random_batch
from tests.oracle import oracle

VARIANTS = [
    *((name, {}) for name in METHODS),
    ("fkl", {"fkl_support": "renorm_both"}),
    ("fkl", {"fkl_support": "tail", "fkl_clamp_zero": True, "fkl_max": 3.0}),
    ("fkl", {"fkl_logprob_min": -10.0, "fkl_max": 10.0, "fkl_clamp_zero": True}),
    ("fkl_reward", {"fkl_support": "renorm", "importance_correction": "tis"}),
    ("jsd", {"jsd_beta": 0.1}),
    ("gkd_jsd", {"jsd_beta": 0.9}),
    ("topk_rkl", {"rkl_support": "raw"}),
    ("topk_rkl", {"rkl_support": "renorm_both"}),
    ("entropy_opd", {"entropy_denominator": "kept"}),
    ("eopd", {"fkl_support": "raw", "outlier_coef": 0.5}),
    ("tropd", {"gate": "expected", "fkl_support": "tail", "guidance_beta": 1.0}),
    ("tropd", {"gate": "threshold", "outlier_coef": 0.3}),
    ("tropd", {"fkl_grad": "reward", "importance_correction": "icepop"}),
    ("tropd", {"reward_logprob": "rollout", "importance_correction": "tis", "tis_cap": 1.1}),
    ("tropd_mask", {"gate": "bernoulli"}),
    ("tropd_clip", {"gate": "expected"}),
    ("aopd", {"gate_margin": -0.1}),
    ("tropd_aopd", {"tropd_aopd_reading": "union_fkl", "tropd_aopd_coef": 0.5}),
    ("reopold", {"reopold_bound": "logit"}),
    ("reopold_two_stage", {"reopold_switch": 0.1}),
    ("opd", {"importance_correction": "seq_err"}),
    ("opd", {"importance_correction": "icepop"}),
    ("grpo", {"grpo_denominator": "tokens", "grpo_kl_coef": 0.1, "importance_correction": "off"}),
    ("grpo", {"importance_correction": "seq_err", "ppo_clip_high": 0.1}),
]
CONTEXT = StepContext(step=40, num_steps=200, entropy_threshold=0.9)

BATCHES = st.fixed_dictionaries(
    {
        "num_tokens": st.sampled_from([1, 7, 24, 24, 60, 200]),
        "vocab_size": st.sampled_from([7, 56, 131, 1031]),
        "top_k": st.sampled_from([1, 2, 7, 64]),
        "seed": st.integers(0, 10_000),
        "scale": st.sampled_from([1.0, 3.0, 6.0, 80.0]),
        "ties": st.booleans(),
        "excluded": st.booleans(),
        "several_updates": st.booleans(),
    }
).map(lambda sizes: {**sizes, "top_k": min(sizes["top_k"], sizes["vocab_size"])})


def _runs(batch, method, numbers):
    """Full-vocabulary divergences of a teacher with a zero are the head's to define."""
    needs = make_objective(method, ObjectiveSettings(**numbers)).needs
    return not (batch["excluded"] and needs.divergence)


def _evaluate(batch, method, numbers):
    variant = sum(map(ord, f"{method}{numbers}"))  # hypothesis shows all variants the same batches
    logits, teacher, tokens = random_batch(**{**batch, "seed": batch["seed"] + variant})
    logits.requires_grad_()
    objective = make_objective(method, ObjectiveSettings(**{"top_k": batch["top_k"], **numbers}))
    stats = dense_stats(logits, teacher, tokens, objective.needs)
    return logits, teacher, tokens, stats, objective


@pytest.mark.parametrize(("method", "numbers"), VARIANTS, ids=lambda value: str(value).replace(" ", ""))
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(batch=BATCHES)
def test_loss_gradient_and_denominator_equal_the_oracle(method, numbers, batch):
    if not _runs(batch, method, numbers):
        return
    logits, teacher, tokens, stats, objective = _evaluate(batch, method, numbers)
    out = objective(stats, tokens, CONTEXT)
    (grad,) = torch.autograd.grad(out.token_loss_T.sum(), logits)
    copy = logits.detach().clone().requires_grad_()
    expected, denominator = oracle(method, copy, teacher, tokens, CONTEXT, **numbers)
    (expected_grad,) = torch.autograd.grad(expected.sum(), copy)
    torch.testing.assert_close(out.token_loss_T, expected, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(grad, expected_grad, atol=1e-9, rtol=1e-9)
    counted = out.denominator
    if counted is None:
        counted = ((tokens.region_T == Region.ON_POLICY) | (tokens.region_T == Region.GUIDANCE)).sum()
    assert counted.dtype == torch.int64 and int(counted) == denominator


@pytest.mark.parametrize(("method", "numbers"), VARIANTS, ids=lambda value: str(value).replace(" ", ""))
def test_any_partition_of_the_labels_adds_up_to_the_whole(method, numbers):
    batch = {"num_tokens": 60, "vocab_size": 31, "top_k": 5, "seed": 11, "several_updates": "seq" in str(numbers)}
    logits, teacher, tokens, stats, objective = _evaluate(batch, method, numbers)
    whole = objective(stats, tokens, CONTEXT)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    losses, denominator, sums = torch.zeros(60, dtype=torch.float64), 0, {}
    for part in order.split([0, 1, 7, 30, 22]):
        rows = tokens.rows(part)
        out = objective(dense_stats(logits[part], teacher[part], rows, objective.needs), rows, CONTEXT)
        losses[part] = out.token_loss_T.detach()
        denominator += 0 if out.denominator is None else int(out.denominator)
        for name, metric in out.metrics.items():
            total, count = sums.get(name, (0.0, 0.0))
            sums[name] = total + float(metric.total), count + float(metric.count)
    torch.testing.assert_close(losses, whole.token_loss_T.detach(), atol=1e-12, rtol=1e-12)
    assert denominator == (0 if whole.denominator is None else int(whole.denominator))
    assert set(sums) == set(whole.metrics) and sums
    for name, (total, count) in sums.items():
        assert total == pytest.approx(float(whole.metrics[name].total), rel=1e-10, abs=1e-10), name
        assert count == pytest.approx(float(whole.metrics[name].count), rel=1e-10, abs=1e-10), name
        assert math.isfinite(total), name


@pytest.mark.parametrize("method", [name for name in METHODS if name != "sft"])
def test_a_token_the_teacher_excludes_is_never_trusted_and_never_nan(method):
    batch = {"num_tokens": 200, "vocab_size": 31, "top_k": 5, "seed": 3, "excluded": True}
    logits, teacher, tokens, stats, objective = _evaluate(batch, method, {})
    if objective.needs.divergence:  # a finite divergence, as the head defines it for such a teacher
        stats = dense_stats(logits, teacher.clamp(min=-30.0), tokens, objective.needs)
    tokens.uniform_T.fill_(1e-300)
    out = objective(stats, tokens, CONTEXT)
    (grad,) = torch.autograd.grad(out.token_loss_T.sum(), logits)
    assert out.token_loss_T.isfinite().all() and grad.isfinite().all()
    assert all(metric.total.isfinite() for metric in out.metrics.values())
    if objective.needs.teacher:
        weight = objective.trust(stats, tokens, CONTEXT)
        excluded = (tokens.region_T == Region.ON_POLICY) & (tokens.teacher_logprob_T == -math.inf)
        assert excluded.any() and torch.count_nonzero(weight[excluded]) == 0


def test_what_no_loss_reads_has_no_influence():
    """Poison in the entries of prompts and padding changes neither a loss nor a gradient."""
    for method in METHODS:
        batch = {"num_tokens": 30, "vocab_size": 31, "top_k": 5, "seed": 5}
        logits, _, tokens, stats, objective = _evaluate(batch, method, {})
        clean = objective(stats, tokens, CONTEXT).token_loss_T
        unread = ~((tokens.region_T == Region.ON_POLICY) | (tokens.region_T == Region.GUIDANCE))
        for name in ("teacher_logprob_T", "rollout_logprob_T", "reference_logprob_T", "teacher_entropy_T"):
            getattr(tokens, name)[unread] = 1e30
        poisoned = objective(stats, tokens, CONTEXT).token_loss_T
        (grad,) = torch.autograd.grad(poisoned.sum(), logits)
        assert torch.equal(clean, poisoned), method
        assert torch.count_nonzero(poisoned[unread]) == 0 and torch.count_nonzero(grad[unread]) == 0, method
        assert grad.isfinite().all(), method


TOP_K_VARIANTS = [  # a divergence over the vocabulary is made by the head, and tested there
    (method, numbers)
    for method, numbers in VARIANTS
    if not make_objective(method, ObjectiveSettings(**numbers)).needs.divergence
]


@pytest.mark.parametrize(("method", "numbers"), TOP_K_VARIANTS, ids=lambda value: str(value).replace(" ", ""))
def test_fp32_is_near_the_oracle_with_logits_of_80(method, numbers):
    batch = {"num_tokens": 200, "vocab_size": 131, "top_k": 16, "scale": 80.0, "seed": 8, "several_updates": True}
    logits, teacher, tokens = random_batch(**batch)
    narrow = {
        name: value.float()
        for name in tokens.__dataclass_fields__
        if (value := getattr(tokens, name)) is not None and value.dtype == torch.float64 and name != "uniform_T"
    }
    logits, teacher, tokens = logits.float().requires_grad_(), teacher.float(), replace(tokens, **narrow)
    objective = make_objective(method, ObjectiveSettings(**{"top_k": 16, **numbers}))
    stats = dense_stats(logits, teacher, tokens, objective.needs)
    out = objective(stats, tokens, CONTEXT)
    (grad,) = torch.autograd.grad(out.token_loss_T.sum(), logits)
    assert out.token_loss_T.dtype == torch.float32
    copy = logits.detach().double().requires_grad_()
    expected, denominator = oracle(method, copy, teacher, tokens, CONTEXT, **numbers)
    (exact,) = torch.autograd.grad(expected.sum(), copy)
    error = float((out.token_loss_T.double() - expected).abs().sum() / expected.abs().sum())
    # In fp32 the mass outside the top-k is known to 1e-7, and topk_rkl's tail takes the logarithm of at least 1e-4 of it.
    limit = 1e-3 if objective.needs.student_top_k and not numbers else 2e-6
    assert error <= limit and float((grad.double() - exact).norm() / exact.norm()) <= 5 * limit
    assert out.denominator is None or int(out.denominator) == denominator
