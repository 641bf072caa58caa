"""The order of prompts is a function of (seed, number consumed) and of nothing else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.types import Prompt


def make_prompts(n):
    return [Prompt(uid=uid, token_ids=(uid + 1,)) for uid in range(n)]


@given(
    n=st.integers(1, 9),
    takes=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    seed=st.integers(0, 5),
    cut=st.data(),
)
def test_any_split_of_takes_gives_the_same_stream(n, takes, seed, cut):
    prompts = make_prompts(n)
    whole = PromptSource(prompts, seed).take(sum(takes))
    source = PromptSource(prompts, seed)
    resumed_at = cut.draw(st.integers(0, len(takes)))
    parts = []
    for number, take in enumerate(takes):
        if number == resumed_at:
            state = source.state_dict()
            source = PromptSource(prompts, seed)
            source.load_state_dict(state)
        parts += source.take(take)
    assert parts == whole and source.consumed == sum(takes)
    for start in range(0, len(whole) - n + 1, n):
        assert {prompt.uid for prompt in whole[start : start + n]} == set(range(n))


def test_epochs_differ_and_seeds_differ():
    source = PromptSource(make_prompts(50), seed=1)
    first, second = source.take(50), source.take(50)
    assert first != second and first != PromptSource(make_prompts(50), seed=2).take(50)
    assert source.epoch == 2


def test_unshuffled_is_file_order():
    source = PromptSource(make_prompts(3), seed=1, shuffle=False)
    assert [prompt.uid for prompt in source.take(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_changed_data_is_refused():
    state = PromptSource(make_prompts(3), seed=1).state_dict()
    with pytest.raises(ValueError, match=r"prompts changed.*--prompt-data.*new run"):
        PromptSource(make_prompts(4), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="cursor -1"):
        PromptSource(make_prompts(3), seed=1).load_state_dict({**state, "consumed": -1})


def test_misuse():
    with pytest.raises(ValueError, match="--prompt-data"):
        PromptSource([], seed=1)
    with pytest.raises(ValueError, match=r"take\(0\)"):
        PromptSource(make_prompts(3), seed=1).take(0)
