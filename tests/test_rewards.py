"""Rewards and the advantages made of them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.data.advantages import group_advantages
from megatron_tropd.grading.grader import make_grader
from megatron_tropd.grading.rewards import RewardSample, exact_match, load_reward_function
from megatron_tropd.types import Prompt, Rollout

ROOT = Path(__file__).resolve().parent.parent


def _sample(response="# 7", finished=True, answer="7", grader="exact"):
    return RewardSample(
        prompt="p", response=response, finished=finished, answer=answer, domain="",
        grader=make_grader(grader, r"#\s*(.*)$"),
    )  # fmt: skip


def test_exact_match():
    assert exact_match(_sample()) == 1.0
    assert exact_match(_sample(response="# 8")) == 0.0 and exact_match(_sample(finished=False)) == 0.0
    with pytest.raises(ValueError, match="--answer-key"):
        exact_match(_sample(answer=None))
    assert load_reward_function("megatron_tropd.grading.rewards:exact_match") is exact_match


@pytest.mark.slow
def test_exact_match_is_as_exact_as_the_grader():
    assert [exact_match(_sample(response="# 14/2", grader=kind)) for kind in ("exact", "math")] == [0.0, 1.0]


rewards = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8).map(lambda n: n / 8)), min_size=1, max_size=24)


@given(drawn=rewards)
def test_group_advantages_equal_numpy(drawn):
    groups, values = [group for group, _ in drawn], np.array([reward for _, reward in drawn])
    grpo = group_advantages(values, groups, baseline="group-mean", divide_by_std=True)
    plain = group_advantages(values, groups, baseline="group-mean", divide_by_std=False)
    others = group_advantages(values, groups, baseline="leave-one-out", divide_by_std=False)
    flat = 0
    for group in set(groups):
        of_group = np.array([i for i, name in enumerate(groups) if name == group])
        r = values[of_group]
        flat += bool(np.ptp(r) == 0)
        mine = [np.array(advantages.values)[of_group] for advantages in (grpo, plain, others)]
        if np.ptp(r) == 0:
            assert not any(a.any() for a in mine)
            continue
        np.testing.assert_allclose(mine[0], (r - r.mean()) / (r.std(ddof=1) + 1e-6), atol=1e-12)
        np.testing.assert_allclose(mine[1], r - r.mean(), atol=1e-12)
        loo = [reward - np.delete(r, i).mean() for i, reward in enumerate(r)]
        np.testing.assert_allclose(mine[2], loo, atol=1e-12)
    assert (grpo.num_groups, grpo.num_flat) == (len(set(groups)), flat)


def _rollout(uid, sample):
    return Rollout(prompt_uid=uid, sample_index=sample, token_ids=(uid, 50 + sample), prompt_len=1, guidance_len=0,
                   logprobs=(0.0,), weight_version=(0, 0), finish="stop")  # fmt: skip


def _rewards_of(path):
    """Rewards of five rollouts, or the error every rank got."""
    from megatron_tropd.training.rewarding import Rewarder, RewardError

    rewarder = Rewarder(
        function=load_reward_function(path),
        decode=lambda ids: " ".join(f"w{i}" for i in ids),
        prompts={uid: Prompt(uid=uid, token_ids=(uid,), answer=f"w{50 + uid // 3}") for uid in (1, 2, 3)},
        grader=make_grader("exact", "(.*)"),
    )
    rollouts = [_rollout(uid, sample) for uid, sample in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0))]
    try:
        return rewarder.rewards(rollouts)
    except RewardError as error:
        return str(error)


def test_every_rank_has_all_rewards_in_order(ranks):
    """The reward is the sampled token, called on the rank whose turn it is."""
    assert ranks(2).run(_rewards_of, "tests.reward_functions:last_word") == [[50.0, 51.0, 50.0, 51.0, 50.0]] * 2


def test_the_built_in_reward_is_the_verdict_of_the_grader(ranks):
    """The answers are w50, w50 and w51; first samples wrote w50, second ones w51."""
    path = "megatron_tropd.grading.rewards:exact_match"
    assert ranks(2).run(_rewards_of, path) == [[1.0, 0.0, 1.0, 0.0, 0.0]] * 2


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("fails_on_a_word", "--reward-function on prompt 3, sample 0: ZeroDivisionError"),
        ("not_a_number", "--reward-function on prompt 1, sample 0: the reward is nan; expected a finite number"),
    ],
)
def test_a_failing_reward_names_the_prompt_on_every_rank(ranks, function, expected):
    for message in ranks(2).run(_rewards_of, f"tests.reward_functions:{function}"):
        assert expected in message


def test_the_documented_reward_function_works(tmp_path, monkeypatch):
    (source,) = re.findall(
        r"```python\n# my_rewards\.py.*?\n(.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL
    )
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    function = load_reward_function("my_rewards:short_and_right")
    assert function(_sample()) == pytest.approx(1 - 0.003)
    assert function(_sample(response="6")) < 0 and function(_sample(answer=None)) < 0
