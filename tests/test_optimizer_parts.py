"""Parameter groups that the checkpoint does not have are one error, not a KeyError inside of Megatron."""

from __future__ import annotations

import pytest

from megatron_tropd.parallel.optimizer_parts import in_parts_of


def _group(wd, *, expert=False, **more):
    return {"wd_mult": wd, "lr_mult": 1.0, "is_decoupled_lr": False, "is_expert_parallel": expert, **more}


SAVED = {"state": {"common_step": 7}, "param_groups": [_group(1.0, lr=1e-3), _group(0.0, lr=1e-4)]}
DENSE = {"state": {0: "a"}, "param_groups": [{"params": [0]}, {"params": [1]}]}
EXPERTS = {"state": {0: "b"}, "param_groups": [{"params": [0]}]}


def test_one_part_to_two():
    groups = [[_group(0.0), _group(1.0)], [_group(1.0, expert=True)]]
    parts = in_parts_of(groups, {**SAVED, 0: DENSE, 1: EXPERTS})
    assert [group["lr"] for group in parts[0]["param_groups"]] == [1e-4, 1e-3]
    assert parts[1]["param_groups"] == [_group(1.0, expert=True, lr=1e-3, params=[0])]
    assert parts[1]["state"] == {0: "b", "common_step": 7}


def test_the_same_parts_stay_as_they_are():
    whole = {**SAVED, "state": {0: "a", "common_step": 7}}
    assert in_parts_of([[_group(1.0), _group(0.0)]], whole) == whole
    assert in_parts_of([[], []], {0: whole, 1: whole}) == {0: whole, 1: whole}


def test_an_unknown_group_is_refused():
    with pytest.raises(ValueError, match=r"no parameter group with \(0.5, 1.0, False\)"):
        in_parts_of([[_group(0.5)], [_group(1.0, expert=True)]], {**SAVED, 0: EXPERTS, 1: EXPERTS})
