"""Bad streams are an error that names what is wrong, before a step is made with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_tropd.objectives.checks import check_streams
from megatron_tropd.objectives.methods import METHODS, ObjectiveSettings, make_objective
from megatron_tropd.types import Needs, Region
from tests.dense import random_batch

EVERYTHING = Needs(top_k=5, teacher_entropy=True, reference_logprob=True, rewards=True)


@pytest.fixture
def tokens():
    return random_batch(num_tokens=40, vocab_size=31, top_k=5, seed=1)[2]


def _first(tokens, region=Region.ON_POLICY):
    return int((tokens.region_T == region).nonzero()[0, 0])


def test_good_streams_pass_and_so_does_a_teacher_that_excludes_tokens(tokens):
    check_streams(tokens, EVERYTHING)
    excluded = random_batch(num_tokens=40, vocab_size=31, top_k=31, seed=1, excluded=True)[2]
    assert (excluded.teacher_logprob_T == -torch.inf).any() and (excluded.teacher_topk_logprob_TK == -torch.inf).any()
    check_streams(excluded, replace(EVERYTHING, top_k=31))


@pytest.mark.parametrize(
    "name",
    [
        "teacher_logprob_T", "teacher_topk_logprob_TK", "teacher_entropy_T", "reference_logprob_T", "rollout_logprob_T",
        "advantage_T",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named_with_their_place(tokens, name, value):
    place = _first(tokens)
    getattr(tokens, name)[place] = value
    with pytest.raises(
        ValueError, match=f"{name}: 1 of 40 labels .* position {place} of prompt 0, sample {place // 7}: "
    ):
        check_streams(tokens, EVERYTHING)


def test_numbers_that_no_loss_reads_may_be_anything(tokens):
    unread = tokens.region_T == Region.PROMPT
    tokens.teacher_logprob_T[unread] = torch.nan
    tokens.rollout_logprob_T[unread] = torch.nan
    check_streams(tokens, EVERYTHING)


def test_a_teacher_nan_on_guidance_is_found(tokens):
    tokens.teacher_logprob_T[_first(tokens, Region.GUIDANCE)] = torch.nan
    with pytest.raises(ValueError, match="teacher_logprob_T: 1 of 40"):
        check_streams(tokens, EVERYTHING)
    check_streams(tokens, Needs(teacher=False, top_k=5))


def test_probabilities_instead_of_logarithms_are_found(tokens):
    wrong = replace(tokens, teacher_logprob_T=tokens.teacher_logprob_T.exp())
    with pytest.raises(ValueError, match="log-probabilities at most 0"):
        check_streams(wrong, EVERYTHING)


@pytest.mark.parametrize("name", ["rollout_logprob_T", "reference_logprob_T"])
def test_only_a_teacher_may_exclude(tokens, name):
    getattr(tokens, name)[_first(tokens)] = -torch.inf
    with pytest.raises(ValueError, match=name):
        check_streams(tokens, EVERYTHING)


@pytest.mark.parametrize(
    ("name", "needs", "message"),
    [
        ("teacher_topk_ids_TK", Needs(top_k=5), "the teacher's top-5, and it sent sampled tokens only"),
        ("teacher_topk_logprob_TK", Needs(top_k=5), "log-probabilities of the teacher's top-5"),
        ("teacher_entropy_T", Needs(teacher_entropy=True), "full-vocabulary entropy"),
        ("teacher_hidden_TH", Needs(divergence="jsd"), "hidden states"),
        ("reference_logprob_T", Needs(reference_logprob=True), "a reference model"),
        ("old_logprob_T", Needs(old_logprob=True), "before the first update"),
        ("advantage_T", Needs(rewards=True), "group advantages"),
    ],
)
def test_a_missing_stream_is_named(tokens, name, needs, message):
    with pytest.raises(ValueError, match=f"{name} is missing: this objective needs .*{message}"):
        check_streams(replace(tokens, **{name: None}), needs)


def test_shapes(tokens):
    with pytest.raises(ValueError, match="teacher_logprob_T has shape \\[39\\], expected 1 axes of 40 labels"):
        check_streams(replace(tokens, teacher_logprob_T=tokens.teacher_logprob_T[1:]), EVERYTHING)
    with pytest.raises(ValueError, match="teacher_topk_ids_TK has 5 tokens per label, expected --top-k 8"):
        check_streams(tokens, Needs(top_k=8))


def test_an_id_that_is_sent_twice_would_count_twice(tokens):
    place = _first(tokens)
    tokens.teacher_topk_ids_TK[place, 3] = tokens.teacher_topk_ids_TK[place, 0]
    with pytest.raises(ValueError, match="an id twice"):
        check_streams(tokens, EVERYTHING)
    tokens.teacher_topk_logprob_TK[place, 3] = -torch.inf  # a filler
    check_streams(tokens, EVERYTHING)


@pytest.mark.parametrize(
    ("method", "numbers", "message"),
    [
        ("tropd", {"top_k": 0}, "--top-k 0"),
        ("jsd", {"top_k": 0}, "--top-k 0"),
        ("jsd", {"jsd_beta": 1.0}, "--jsd-beta 1.0"),
        ("gkd_jsd", {"jsd_beta": 0.0}, "--jsd-beta 0.0"),
        ("clip_outlier", {"outlier_threshold": 0.5}, "--outlier-threshold 0.5"),
        ("entropy_opd", {"entropy_share": 0.0}, "--entropy-share 0.0"),
        ("reopold", {"reopold_lambda": 1.0}, "--reopold-lambda 1.0"),
        ("reopold_two_stage", {"reopold_lambda": 0.6, "reopold_bound": "logit"}, "--reopold-lambda 0.6"),
        ("reopold_two_stage", {"reopold_switch": 1.5}, "--reopold-switch 1.5"),
        ("gopd", {"gopd_lambda": 0.0}, "--gopd-lambda 0.0"),
        ("topd", {"topd_alpha": 1.0}, "--topd-alpha 1.0"),
        ("tropd_floor", {"reward_floor": 0.0}, "--reward-floor 0.0"),
        ("grpo", {"grpo_kl_coef": -1.0}, "--grpo-kl-coef -1.0"),
        ("fkl", {"fkl_logprob_min": 1.0}, "--fkl-logprob-min 1.0"),
        ("opd", {"tis_cap": 0.0}, "--tis-cap 0.0"),
        ("opd", {"icepop_low": 6.0}, "--icepop-low 6.0"),
        ("opd", {"sequence_error_max": 0.5}, "--sequence-error-max 0.5"),
        ("opd", {"ppo_clip": 1.0}, "--ppo-clip 1.0"),
        ("opd", {"num_minibatches": 0}, "--num-minibatches 0"),
        ("tropd", {"guidance_beta": -1.0}, "--guidance-beta -1.0"),
        ("tropd", {"outlier_coef": -1.0}, "--outlier-coef -1.0"),
    ],
)
def test_a_setting_out_of_its_range_names_its_flag(method, numbers, message):
    with pytest.raises(ValueError, match=message):
        make_objective(method, ObjectiveSettings(**numbers))


def test_every_method_can_be_made_from_the_defaults():
    for method in METHODS:
        assert make_objective(method, ObjectiveSettings()).needs.top_k in (0, 64)
