"""What methods report, against plain means over labels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_tropd.objectives.methods import METHODS, ObjectiveSettings, make_objective
from megatron_tropd.reporting.metric_names import METRICS
from megatron_tropd.types import Region, StepContext
from tests.dense import dense_stats, random_batch

CONTEXT = StepContext(step=40, num_steps=200, entropy_threshold=0.9)


def _report(method, excluded=False, **numbers):
    logits, teacher, tokens = random_batch(
        num_tokens=120, vocab_size=31, top_k=5, seed=6, scale=6.0, several_updates=True, excluded=excluded
    )
    objective = make_objective(method, ObjectiveSettings(top_k=5, **numbers))
    stats = dense_stats(logits, teacher.clamp(min=-50), tokens, objective.needs)
    overlap = torch.linspace(0, 1, 120, dtype=torch.float64)
    out = objective(replace(stats, topk_overlap_T=overlap), tokens, CONTEXT)
    means = {name: float(metric.total / metric.count) for name, metric in out.metrics.items()}
    return logits, teacher, tokens, overlap, means


@pytest.mark.parametrize("method", METHODS)
def test_every_metric_has_a_row_in_the_table_of_names(method):
    assert set(_report(method)[-1]) <= set(METRICS)


def test_values_equal_plain_means():
    logits, teacher, tokens, overlap, found = _report("tropd", excluded=True)
    log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
    rows = [t for t in range(120) if tokens.region_T[t] == Region.ON_POLICY]
    prefix = [t for t in range(120) if tokens.region_T[t] == Region.GUIDANCE]
    own = {t: float(log_p[t, tokens.label_T[t]]) for t in range(120)}
    # The reward is that of the policy that wrote: the one before the first update.
    reward = {t: float(log_q[t, tokens.label_T[t]] - tokens.old_logprob_T[t]) for t in rows}
    finite = [t for t in rows if reward[t] > -torch.inf]
    assert len(finite) < len(rows)
    trusted = [t for t in finite if float(tokens.uniform_T[t].log()) < reward[t]]
    rejected = [t for t in finite if t not in trusted]
    assert trusted and rejected
    engine = {t: float((tokens.old_logprob_T[t] - tokens.rollout_logprob_T[t]).exp()) for t in rows}
    policy = {t: float((own[t] - tokens.old_logprob_T[t]).exp()) for t in rows}

    def mean(values):
        values = list(values)
        return sum(float(v) for v in values) / len(values)

    def kl(t):
        ids = tokens.teacher_topk_ids_TK[t]
        q, p = log_q[t, ids].exp(), log_p[t, ids].exp()
        return (q * (q / p).log()).sum()

    def jsd(t):
        ids = tokens.teacher_topk_ids_TK[t]
        q, p = log_q[t, ids].exp(), log_p[t, ids].exp()
        ratio = torch.tensor(reward[t], dtype=torch.float64).exp()  # q(x) / p(x) before the first update
        return 0.5 * (q * (2 * q / (p + q)).log()).sum() + 0.5 * (2 / (1 + ratio)).log()

    expected = {
        "tropd/trusted_frac": len(trusted) / len(rows),
        "tropd/outlier_frac": mean(reward[t] < -1.72 for t in rows),
        "tropd/reward_mean": mean(reward[t] for t in finite),
        "tropd/k1_trusted": mean(reward[t] for t in trusted),
        "tropd/k1_rejected": mean(reward[t] for t in rejected),
        "tropd/guidance_nll": mean(-own[t] for t in prefix),
        "tropd/topk_overlap": mean(overlap[t] for t in rows),
        "tropd/forward_kl_topk": mean(kl(t) for t in rows),
        "tropd/jsd_topk": mean(jsd(t) for t in rows),
        "tropd/teacher_topk_mass": mean(log_q[t, tokens.teacher_topk_ids_TK[t]].exp().sum() for t in rows),
        "tropd/student_topk_mass": mean(log_p[t, tokens.teacher_topk_ids_TK[t]].exp().sum() for t in rows),
        "student/entropy": mean(-(log_p[t].exp() * log_p[t]).sum() for t in rows),
        "teacher/entropy": mean(tokens.teacher_entropy_T[t] for t in rows),
        "importance/ratio_mean": mean(engine.values()),
        "importance/truncated_frac": mean(engine[t] > 2.0 for t in rows),
        "importance/masked_frac": mean(not 0.5 <= engine[t] <= 5.0 for t in rows),
        "ppo/ratio_mean": mean(policy.values()),
        "ppo/clipped_frac": mean(not 0.8 <= policy[t] <= 1.2 for t in rows),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-9), name


def test_methods_report_what_is_theirs():
    _, _, tokens, _, clip = _report("clip_outlier")
    assert (
        clip["tropd/clamped_frac"] == pytest.approx(1 - clip["tropd/trusted_frac"]) and clip["tropd/clamped_frac"] > 0
    )
    assert 0 < _report("tropd_floor")[-1]["tropd/clamped_frac"] < 1
    entropy = _report("entropy_opd")[-1]
    rows = tokens.region_T == Region.ON_POLICY
    assert entropy["tropd/selected_frac"] == pytest.approx(float((tokens.old_entropy_T[rows] >= 0.9).double().mean()))
    masked = _report("opd", importance_correction="seq_err")[-1]["importance/masked_frac"]
    assert masked == pytest.approx(float((tokens.sequence_error_T[rows] > 2.0).double().mean()))
    assert not any(name.startswith("tropd/k1") or name.startswith("teacher/") for name in _report("grpo")[-1])
    assert _report("full_rkl")[-1]["tropd/divergence"] > 0


def test_a_method_without_a_gate_reports_the_overlap_of_the_two_models():
    opd, soft = _report("opd")[-1], _report("tropd", gate="expected")[-1]
    for name in ("tropd/trusted_frac", "tropd/k1_trusted", "tropd/k1_rejected"):
        assert opd[name] == soft[name]


def test_nothing_to_report_is_a_count_of_zero():
    logits, teacher, tokens = random_batch(num_tokens=6, vocab_size=31, top_k=5, seed=6)
    for part in (tokens.rows(torch.arange(0)), replace(tokens, region_T=torch.zeros(6, dtype=torch.uint8))):
        for method in METHODS:
            objective = make_objective(method, ObjectiveSettings(top_k=5))
            n = len(part.label_T)
            out = objective(dense_stats(logits[:n], teacher[:n], part, objective.needs), part, CONTEXT)
            assert all(m.total == 0 and m.count == 0 for m in out.metrics.values()), method
            assert torch.count_nonzero(out.token_loss_T) == 0 and not out.denominator
