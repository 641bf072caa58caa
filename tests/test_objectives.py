"""Objectives against golden values (tests/golden/golden.json) and their identities."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.objectives.methods import ObjectiveSettings, make_objective
from megatron_tropd.objectives.methods import markdown_table as methods_table
from megatron_tropd.objectives.settings import markdown_table as settings_table
from megatron_tropd.types import Needs, Region, StepContext
from tests.dense import dense_stats, make_streams

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
CASES = sorted(GOLDEN["cases"])
C = GOLDEN["constants"]
TAU = C["tau_jensen"]
VERL = {"fkl_logprob_min": C["verl_log_prob_min_clamp"], "fkl_max": C["verl_loss_max_clamp"], "fkl_clamp_zero": True}
METHODS = {
    # golden name: (method, settings)
    "opd_k1_pg": ("opd", {}),
    "opd_k1_is": ("opd", {"importance_correction": "tis", "reward_logprob": "rollout"}),
    "clip_outlier": ("clip_outlier", {"outlier_threshold": TAU}),
    "mask_outlier": ("mask_outlier", {"outlier_threshold": TAU}),
    "reopold_phase1": ("reopold_two_stage", {}),
    "vopd": ("vopd", {}),
    "topd": ("topd", {"topd_alpha": C["alpha_topd"]}),
    "gopd_1.25": ("gopd", {"gopd_lambda": C["lambda_gopd"]}),
    "rkl_full": ("full_rkl", {}),
    "fkl_full": ("full_fkl", {}),
    "fkl_topk_raw": ("fkl", {}),
    "fkl_topk_raw_clamp0": ("fkl", {"fkl_clamp_zero": True}),
    "fkl_topk_verl_clamped": ("fkl", VERL),
    "fkl_topk_renorm_teacher": ("fkl", {"fkl_support": "renorm"}),
    "fkl_topk_renorm_both": ("fkl", {"fkl_support": "renorm_both"}),
    "fkl_topk_tailbucket": ("fkl", {"fkl_support": "tail"}),
    "fkl_topk_as_reward": ("fkl_reward", {}),
    "fkl_topk_renorm_as_reward": ("fkl_reward", {"fkl_support": "renorm"}),
    "jsd_eq4_mixed": ("jsd", {}),
    "jsd_eq4_as_reward": ("jsd_reward", {}),
    "jsd_full_gkd": ("gkd_jsd", {}),
    "eopd_renorm": ("eopd", {}),
    "eopd_raw": ("eopd", {"fkl_support": "raw"}),
    "aopd": ("aopd", {}),
    "tropd_mask": ("tropd_mask", {"gate": "bernoulli"}),
    "tropd_fkl_direct": ("tropd", {}),
    "tropd_fkl_direct_expected_gate": ("tropd", {"gate": "expected"}),
    "tropd_fkl_direct_tailbucket": ("tropd", {"fkl_support": "tail"}),
    "tropd_clip_adaptive": ("tropd_clip", {"gate": "bernoulli", "outlier_threshold": TAU}),
    "tropd_fkl_reward": ("tropd", {"fkl_grad": "reward"}),
    "tropd_fkl_reward_renorm": ("tropd", {"fkl_grad": "reward", "fkl_support": "renorm"}),
    "prefix_nll": ("tropd", {}),
    "prefix_logratio_as_reward": ("tropd_official", {}),
}
SAME = {  # one more name for a golden value
    ("tropd_paper", "tropd_fkl_direct"), ("fkl_outlier", "tropd_fkl_direct"), ("reopold", "clip_outlier"),
}  # fmt: skip


def _state(cases, uniform, dtype=torch.float64, regions=None, needs=None):
    """(logits that want a gradient, streams, statistics by plain log-softmax) of golden states."""
    logits = torch.tensor([c["student_logits"] for c in cases], dtype=dtype, requires_grad=True)
    teacher = torch.tensor([c["teacher_logits"] for c in cases], dtype=torch.float64).log_softmax(-1)
    label = torch.tensor([c["meta"]["sampled"] for c in cases])
    blank, _ = make_streams(
        num_tokens=len(cases), vocab_size=5, top_k=2, regions=regions or [Region.ON_POLICY] * len(cases)
    )
    reference = torch.tensor([c.get("ref_logits", [0.0] * 5) for c in cases], dtype=torch.float64).log_softmax(-1)
    values, ids = teacher.topk(2, -1)
    log_p = logits.log_softmax(-1)
    at_label = log_p.gather(1, label[:, None])[:, 0]

    def sampled(rows):
        return rows.gather(1, label[:, None])[:, 0].to(dtype)

    tokens = replace(
        blank,
        label_T=label,
        uniform_T=torch.tensor(uniform, dtype=torch.float64),
        rollout_logprob_T=at_label.detach() + C["behaviour_logprob_offset"],
        teacher_logprob_T=sampled(teacher),
        teacher_topk_ids_TK=ids,
        teacher_topk_logprob_TK=values.to(dtype),
        teacher_entropy_T=-(teacher.exp() * teacher).nan_to_num(0.0).sum(-1).to(dtype),
        reference_logprob_T=sampled(reference),
    )
    stats = dense_stats(logits, teacher.to(dtype), tokens, needs or Needs(top_k=2))
    return logits, tokens, stats


def _evaluate(method, settings, cases, uniform, regions=None, dtype=torch.float64):
    """(output, gradient of the summed token losses w.r.t. full logits) of golden states."""
    objective = make_objective(method, ObjectiveSettings(**{"top_k": 2, **settings}))
    logits, tokens, stats = _state(cases, uniform, dtype, regions, objective.needs)
    out = objective(stats, tokens, StepContext())
    (grad,) = torch.autograd.grad(out.token_loss_T.sum(), logits)
    return out, grad


def test_every_golden_loss_has_a_method():
    assert all(set(case["losses"]) == set(METHODS) for case in GOLDEN["cases"].values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_value_and_gradient_equal_golden(name, case, dtype):
    method, settings = METHODS[name]
    golden = GOLDEN["cases"][case]
    region = Region.GUIDANCE if name.startswith("prefix") else Region.ON_POLICY
    out, grad = _evaluate(method, settings, [golden], [golden["meta"]["u"]], [region], dtype)
    expected = golden["losses"][name]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4 if case.startswith("c4") else 1e-5
    relative = tolerance if dtype == torch.float64 else 0.0
    assert out.token_loss_T.item() == pytest.approx(expected["loss"], abs=tolerance, rel=relative)
    torch.testing.assert_close(
        grad[0].double(), torch.tensor(expected["grad"], dtype=torch.float64), atol=tolerance, rtol=relative
    )


@pytest.mark.parametrize(
    ("name", "method", "numbers"),
    [
        ("tropd_fkl_direct", "tropd", {}),
        ("tropd_fkl_reward", "tropd", {"fkl_grad": "reward", "guidance_grad": "logratio_reward"}),
        ("tropd_mask", "tropd_mask", {"gate": "bernoulli"}),
    ],
)
def test_batch_with_a_prefix_token_equals_golden(name, method, numbers):
    golden = GOLDEN["batch"]
    cases = [GOLDEN["cases"][case] for case, on_policy in golden["tokens"] if on_policy]
    prefix = golden["prefix_token"]
    cases.append({**prefix, "meta": {"sampled": prefix["sampled"]}})
    regions = [Region.ON_POLICY] * (len(cases) - 1) + [Region.GUIDANCE]
    uniform = [c["meta"]["u"] for c in cases[:-1]] + [0.5]
    out, grad = _evaluate(method, numbers, cases, uniform, regions)
    aggregate = golden["aggregates"][name]
    assert out.token_loss_T.sum().item() == pytest.approx(aggregate["sum"], abs=1e-10)
    assert int(out.denominator) == aggregate["n_on"] + aggregate["n_prefix"]
    mean = out.token_loss_T.sum() / out.denominator
    assert mean.item() == pytest.approx(aggregate["token_mean_all"], abs=1e-10)
    expected = prefix["losses"][aggregate["prefix_term"]]
    assert out.token_loss_T[-1].item() == pytest.approx(expected["loss"], abs=1e-10)
    torch.testing.assert_close(grad[-1], torch.tensor(expected["grad"], dtype=torch.float64), atol=1e-10, rtol=0)


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
    with pytest.raises(ValueError, match=r"'trpod' is not known; choose one of opd, fkl, .*, tropd, "):
        make_objective("trpod", ObjectiveSettings())


@pytest.mark.slow
def test_objectives_import_torch_only():
    import subprocess
    import sys

    code = (
        "import sys, megatron_tropd.objectives.methods;"
        "bad = [m for m in ('megatron.core', 'transformers', 'sglang', 'torch.distributed.elastic') if m in sys.modules];"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_tables_of_the_docs_are_those_of_the_code():
    document = (Path(__file__).parents[1] / "docs" / "objectives.md").read_text(encoding="utf-8")
    assert methods_table() in document, "paste what megatron_tropd.objectives.methods.markdown_table() returns"
    assert settings_table() in document, "paste what megatron_tropd.objectives.settings.markdown_table() returns"


@pytest.mark.parametrize(("method", "golden_name"), sorted(SAME))
def test_two_names_of_one_loss(method, golden_name):
    _, numbers = METHODS[golden_name]
    for case in CASES:
        golden = GOLDEN["cases"][case]
        out, _ = _evaluate(method, numbers, [golden], [golden["meta"]["u"]])
        assert out.token_loss_T.item() == pytest.approx(golden["losses"][golden_name]["loss"], abs=1e-10, rel=1e-10)


@pytest.mark.parametrize("method", ["opd", "clip_outlier", "mask_outlier", "reopold", "aopd"])
def test_a_method_named_after_its_gate_does_not_read_the_flag(method):
    plain, gated = (make_objective(method, ObjectiveSettings(gate=gate)) for gate in ("auto", "expected"))
    assert plain == gated
