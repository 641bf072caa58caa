"""The exact quantile: the same number wherever the values are."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st


def _threshold(values, share, cut):
    """On rank r: the quantile over the values between cut[r] and cut[r + 1]."""
    from megatron_tropd.ops.vocab_parallel import quantile_threshold

    rank = dist.get_rank()
    return quantile_threshold(torch.tensor(values[cut[rank] : cut[rank + 1]]), share)


def _expected(values, share):
    chosen = math.ceil(round(share * len(values), 9))
    return sorted(torch.tensor(values).tolist(), reverse=True)[chosen - 1]


VALUES = torch.rand(1000, generator=torch.Generator().manual_seed(0)).mul(8).tolist()


@pytest.mark.parametrize("share", [0.2, 0.001, 1.0, 0.333])
def test_any_split_over_ranks_gives_the_sorted_value(ranks, share):
    expected = _expected(VALUES, share)
    selected = sum(value >= expected for value in torch.tensor(VALUES).tolist())
    assert selected == math.ceil(share * 1000)
    for cut in ([0, 1000, 1000, 1000, 1000], [0, 250, 500, 750, 1000], [0, 3, 3, 900, 1000]):
        assert ranks(4).run(_threshold, VALUES, share, cut) == [expected] * 4
    assert ranks(1).run(_threshold, VALUES, share, [0, 1000]) == [expected]


def test_ties_at_the_threshold_are_all_selected(ranks):
    values = [1.0] * 7 + [2.0, 3.0] + [0.0, -0.0, -1.5]
    assert ranks(2).run(_threshold, values, 0.25, [0, 4, 12]) == [1.0, 1.0]  # 3 of 12 asked, 9 are >= 1
    assert ranks(2).run(_threshold, values, 11 / 12, [0, 4, 12]) == [0.0, 0.0]  # -0.0 is 0.0


def test_no_value_anywhere_gives_infinity(ranks):
    assert ranks(2).run(_threshold, [], 0.2, [0, 0, 0]) == [math.inf, math.inf]


def _refused():
    from megatron_tropd.ops.vocab_parallel import quantile_threshold

    with pytest.raises(ValueError, match=r"share 0\.0: must be above 0"):
        quantile_threshold(torch.ones(3), 0.0)


def test_share_of_nothing_is_refused(ranks):
    ranks(1).run(_refused)


def _many(drawn):
    return [_threshold(values, share, [0, len(values)]) for values, share in drawn]


@settings(max_examples=5, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
            st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]),
        ),
        min_size=20,
        max_size=20,
    )
)
def test_any_fp32_values(ranks, drawn):
    assert ranks(1).run(_many, drawn) == [[_expected(values, share) for values, share in drawn]]
