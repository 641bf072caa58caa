"""Objectives against golden values (tests/golden/golden.json) and their identities."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.objectives.methods import ObjectiveSettings, make_objective
from megatron_tropd.types import Region, StepContext, TokenStats
from tests.dense import make_streams

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
CASES = sorted(GOLDEN["cases"])
METHODS = {
    # golden name: (method, settings)
    "opd_k1_pg": ("opd", {}),
    "tropd_fkl_direct": ("tropd", {}),
    "tropd_fkl_direct_expected_gate": ("tropd", {"gate": "expected"}),
    "tropd_fkl_direct_tailbucket": ("tropd", {"fkl_support": "tail"}),
}


def _evaluate(method, settings, cases, uniform, regions=None):
    """(token losses, gradient of their sum w.r.t. full logits) of golden states, in float64."""
    logits = torch.tensor([c["student_logits"] for c in cases], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([c["teacher_logits"] for c in cases], dtype=torch.float64).log_softmax(-1)
    label = torch.tensor([c["meta"]["sampled"] for c in cases])
    blank, _ = make_streams(
        num_tokens=len(cases), vocab_size=5, top_k=2, regions=regions or [Region.ON_POLICY] * len(cases)
    )
    values, ids = log_q.topk(2, -1)
    tokens = replace(
        blank,
        label_T=label,
        uniform_T=torch.tensor(uniform, dtype=torch.float64),
        teacher_logprob_T=log_q.gather(1, label[:, None])[:, 0],
        teacher_topk_ids_TK=ids,
        teacher_topk_logprob_TK=values,
    )
    log_p = logits.log_softmax(-1)
    stats = TokenStats(
        logprob_T=log_p.gather(1, label[:, None])[:, 0],
        topk_logprob_TK=log_p.gather(1, ids),
        entropy_T=-(log_p.exp() * log_p).sum(-1),
    )
    objective = make_objective(method, ObjectiveSettings(**{"top_k": 2, "guidance_beta": 0.001, **settings}))
    out = objective(stats, tokens, StepContext())
    (grad,) = torch.autograd.grad(out.token_loss_T.sum(), logits)
    return out, grad


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_equal_golden(name, case):
    method, settings = METHODS[name]
    golden = GOLDEN["cases"][case]
    out, grad = _evaluate(method, settings, [golden], [golden["meta"]["u"]])
    expected = golden["losses"][name]
    # trust weights are fp32 by design: the expected gate multiplies by one
    tolerance = 1e-6 if settings.get("gate") == "expected" else 1e-10
    assert out.token_loss_T.item() == pytest.approx(expected["loss"], abs=tolerance, rel=tolerance)
    torch.testing.assert_close(
        grad[0], torch.tensor(expected["grad"], dtype=torch.float64), atol=tolerance, rtol=tolerance
    )


def test_batch_sum_with_a_prefix_token_equals_golden():
    golden = GOLDEN["batch"]
    cases = [GOLDEN["cases"][name] for name, on_policy in golden["tokens"] if on_policy]
    prefix = golden["prefix_token"]
    cases.append({**prefix, "meta": {"sampled": prefix["sampled"]}})
    regions = [Region.ON_POLICY] * (len(cases) - 1) + [Region.GUIDANCE]
    uniform = [c["meta"]["u"] for c in cases[:-1]] + [0.5]
    out, _ = _evaluate("tropd", {}, cases, uniform, regions)
    assert out.token_loss_T.sum().item() == pytest.approx(golden["aggregates"]["tropd_fkl_direct"]["sum"], abs=1e-10)


def test_a_token_the_teacher_excludes_is_never_trusted_and_never_nan():
    case = dict(GOLDEN["cases"][CASES[0]])
    case["teacher_logits"] = [-math.inf if i == case["meta"]["sampled"] else 1.0 for i in range(5)]
    for settings in ({}, {"gate": "expected"}, {"gate": "threshold"}, {"fkl_support": "tail"}):
        out, grad = _evaluate("tropd", settings, [case], [1e-12])
        assert out.token_loss_T.isfinite().all() and grad.isfinite().all()
        trusted = out.metrics["tropd/trusted_frac"]
        assert trusted.total.item() == 0.0 and trusted.count.item() == 1.0


def test_expected_gate_is_the_mean_of_the_coin():
    golden = GOLDEN["cases"]["c3_ratio_below1_accepted"]
    coins = [(i + 0.5) / 3000 for i in range(3000)]
    _, grads = _evaluate("tropd", {}, [golden] * 3000, coins)
    _, expected = _evaluate("tropd", {"gate": "expected"}, [golden], [0.5])
    torch.testing.assert_close(grads.mean(0), expected[0], atol=2e-4, rtol=0)


def test_expected_k1_gradient_is_the_reverse_kl_gradient():
    golden = dict(GOLDEN["cases"]["c2_rejected_outlier"])
    p = torch.tensor(golden["student_logits"], dtype=torch.float64).softmax(-1)
    total = torch.zeros(5, dtype=torch.float64)
    for token in range(5):
        _, grad = _evaluate("opd", {}, [{**golden, "meta": {"sampled": token}}], [0.5])
        total += p[token] * grad[0]
    expected = GOLDEN["identities"]["c2_rejected_outlier"]["grad_rkl"]
    torch.testing.assert_close(total, torch.tensor(expected, dtype=torch.float64), atol=1e-10, rtol=0)


def test_padding_prompt_and_copied_guidance_have_no_loss():
    regions = [Region.PAD, Region.PROMPT, Region.GUIDANCE_COPY]
    case = GOLDEN["cases"][CASES[1]]
    out, grad = _evaluate("tropd", {}, [case] * 3, [0.1] * 3, regions)
    assert torch.count_nonzero(out.token_loss_T) == 0 and torch.count_nonzero(grad) == 0


def test_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError, match="'trpod' is not known; choose one of opd, tropd"):
        make_objective("trpod", ObjectiveSettings())


def test_objectives_import_torch_only():
    import subprocess
    import sys

    code = (
        "import sys, megatron_tropd.objectives.methods;"
        "bad = [m for m in ('megatron.core', 'transformers', 'sglang', 'torch.distributed.elastic') if m in sys.modules];"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
