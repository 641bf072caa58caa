"""Prefix guidance against the golden schedule and its invariants."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.data.guidance import (
    GuidanceConfig,
    Mode,
    Schedule,
    alpha,
    attach,
    check_guidance,
    prefix_length,
    whole_responses,
)
from megatron_tropd.types import Prompt

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())["prefix_schedule"]
STOP = 0


def make_prompt(uid, teacher_len):
    response = (*range(1000, 1000 + teacher_len - 1), STOP) if teacher_len else None
    return Prompt(uid=uid, token_ids=(1, 2, 3), teacher_response_ids=response)


def request_lengths(prompts, step, config, **kwargs):
    arguments = {"seed": 1, "n_samples_per_prompt": 2, "max_response_length": 16, **kwargs}
    return [request.guidance_len for request in attach(prompts, step, config, **arguments)]


@pytest.mark.parametrize("step", sorted(map(int, GOLDEN)))
def test_golden_schedule(step):
    golden = GOLDEN[str(step)]
    assert alpha("half-cosine", step, 200) == pytest.approx(golden["alpha"], abs=1e-15)
    for mode in ("ratio", "cap"):
        length = prefix_length(GuidanceConfig(mode=mode), step, 3000, 8096, 0.0)
        # Golden numbers keep the stop token at step 0; ours never gives it (row 13).
        assert length == min(golden[f"len_{mode}_mode_LT3000" + "_Lmax8096" * (mode == "cap")], 2999)


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_schedules_fall_from_one_to_zero(schedule):
    values = [alpha(schedule, step, 40) for step in range(50)]
    assert values[0] == 1 and values[40:] == [0] * 10
    assert all(a > b for a, b in pairwise(values[:41]))


def test_schedule_midpoints():
    assert alpha("half-cosine", 20, 40) == pytest.approx(0.5)
    assert alpha("quarter-cosine", 20, 40) == pytest.approx(math.sqrt(0.5))
    assert alpha("linear", 10, 40) == 0.75


@given(
    mode=st.sampled_from(get_args(Mode)),
    schedule=st.sampled_from(get_args(Schedule)),
    step=st.integers(0, 60),
    teacher_len=st.integers(0, 50),
    limit=st.integers(1, 60),
    u=st.floats(0, 1, exclude_max=True),
)
def test_prefix_leaves_a_token_to_write(mode, schedule, step, teacher_len, limit, u):
    config = GuidanceConfig(mode=mode, schedule=schedule, steps=50)
    length = prefix_length(config, step, teacher_len, limit, u)
    assert 0 <= length <= max(0, min(teacher_len, limit) - 1)
    if mode == "none" or step >= 50:
        assert length == 0


def test_uniform_reaches_both_ends():
    config = GuidanceConfig(mode="uniform", steps=10)
    assert prefix_length(config, 0, 8, 100, 0.0) == 0
    assert prefix_length(config, 0, 8, 100, 1 - 1e-12) == 7
    assert {prefix_length(config, 0, 8, 100, i / 100) for i in range(100)} == set(range(8))
    half = GuidanceConfig(mode="uniform", schedule="linear", steps=10)
    assert [prefix_length(half, 5, 100, 8, i / 10) for i in range(0, 10, 2)] == [0, 1, 2, 3, 4]


def test_attach_builds_requests():
    prompts = [make_prompt(5, 9), make_prompt(6, 0)]
    config = GuidanceConfig(mode="ratio", steps=4, schedule="linear")
    requests = attach(prompts, 1, config, seed=3, n_samples_per_prompt=2, max_response_length=16)
    assert [(r.prompt_uid, r.sample_index, r.guidance_len) for r in requests] == [
        (5, 0, 6),
        (5, 1, 6),
        (6, 0, 0),
        (6, 1, 0),
    ]
    assert requests[0].token_ids == (1, 2, 3, 1000, 1001, 1002, 1003, 1004, 1005) and requests[0].prompt_len == 3
    assert [r.max_new_tokens for r in requests] == [10, 10, 16, 16]


@pytest.mark.parametrize("mode", get_args(Mode))
def test_stop_token_is_never_given(mode):
    prompts = [make_prompt(uid, length) for uid, length in enumerate([1, 2, 5, 30])]
    for request in attach(prompts, 0, GuidanceConfig(mode=mode), seed=1, n_samples_per_prompt=1, max_response_length=8):
        assert STOP not in request.token_ids[request.prompt_len :]
        assert request.max_new_tokens >= 1 and request.guidance_len + request.max_new_tokens == 8


def test_uniform_draw_is_named_by_prompt_step_and_seed():
    config = GuidanceConfig(mode="uniform", steps=1000)
    prompts = [make_prompt(uid, 1000) for uid in range(6)]
    arguments = {"n_samples_per_prompt": 3, "max_response_length": 2000}
    lengths = request_lengths(prompts, 5, config, **arguments)
    assert all(len(set(lengths[i : i + 3])) == 1 for i in range(0, 18, 3)) and len(set(lengths)) > 3
    # A prompt's length does not depend on its company or on its place in the batch.
    assert request_lengths(prompts[::-1], 5, config, **arguments) == lengths[::-1]
    assert request_lengths(prompts[2:3], 5, config, **arguments) == lengths[6:9]
    assert request_lengths(prompts, 6, config, **arguments) != lengths
    assert request_lengths(prompts, 5, config, seed=2, **arguments) != lengths


def test_repeated_prompt_goes_on_numbering():
    prompt = make_prompt(4, 9)
    requests = attach(
        [prompt, prompt], 0, GuidanceConfig(mode="ratio"), seed=1, n_samples_per_prompt=2, max_response_length=16
    )
    assert [request.sample_index for request in requests] == [0, 1, 2, 3]
    assert len({request.guidance_len for request in requests}) == 1


def test_attach_misuse():
    with pytest.raises(ValueError, match="--n-samples-per-prompt 0"):
        request_lengths([make_prompt(1, 3)], 0, GuidanceConfig(), n_samples_per_prompt=0)
    assert attach([], 0, GuidanceConfig(), seed=1, n_samples_per_prompt=1, max_response_length=1) == []


def check(config, num_prompts, num_responses, min_share=0.5):
    return check_guidance(config, num_prompts=num_prompts, num_responses=num_responses, min_share=min_share)


def test_check_guidance():
    assert check(GuidanceConfig(), 1, 0) == []
    assert check(GuidanceConfig(mode="cap"), 2, 1) == []
    (error,) = check(GuidanceConfig(mode="cap"), 1, 0)
    assert "none of the 1 prompts" in error and "--response-key" in error and "--guidance none" in error
    bad = GuidanceConfig(mode="often", schedule="cubic", steps=0, beta=-1.0)
    assert [error.split()[0] for error in check(bad, 2, 2)] == [
        "--guidance",
        "--guidance-schedule",
        "--guidance-beta",
        "--guidance-steps",
    ]


def test_too_few_responses_are_refused():
    (error,) = check(GuidanceConfig(mode="ratio"), 40, 1)
    assert "1 of the 40 prompts have one" in error and "--min-response-share 0.5" in error
    assert check(GuidanceConfig(mode="ratio"), 40, 1, min_share=0.02) == []
    assert "none of the 40" in check(GuidanceConfig(mode="ratio"), 40, 0, min_share=0.0)[0]


def test_a_cut_response_is_shortened_by_its_whole_length():
    """Of 30 tokens the first 12 were kept; the ratio is of 30, and the prefix ends before the limit."""
    cut = Prompt(uid=3, token_ids=(1, 2), teacher_response_ids=tuple(range(10, 22)), teacher_response_len=30)
    lengths = []
    for step in range(11):
        config = GuidanceConfig(mode="ratio", schedule="linear", steps=10)
        (request,) = attach([cut], step, config, seed=1, n_samples_per_prompt=1, max_response_length=12)
        lengths.append(request.guidance_len)
        assert request.token_ids == (1, 2, *range(10, 10 + request.guidance_len))
    assert lengths == [11, 11, 11, 11, 11, 11, 11, 9, 6, 3, 0]
    (rollout,) = whole_responses([cut], 0)
    assert rollout.finish == "length" and rollout.token_ids == (1, 2, *range(10, 22))
