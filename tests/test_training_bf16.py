"""bf16 weights with fp32 gradients and master weights, as a run on GPUs has them."""

from __future__ import annotations

import math

import pytest

from tests.tiny_run import flags, make_world, reports_here, train_here

LAYOUTS = {
    "TP2, sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "DP2, distributed optimizer": {"use_distributed_optimizer": True},
}


def _train(argv, stop_after=None):
    return train_here(argv, stop_after)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def one_rank(ranks, world, tmp_path_factory):
    return ranks(1).run(_train, flags(world, tmp_path_factory.mktemp("run") / "one", train_iters=1, bf16=True))[0]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_the_first_step_is_the_same_in_every_layout(ranks, world, one_rank, tmp_path, name):
    """Later steps sample from weights that were rounded differently."""
    curve = ranks(2).run(_train, flags(world, tmp_path / "run", train_iters=1, bf16=True, **LAYOUTS[name]))[0]
    assert all(math.isfinite(number) for number in curve[0])
    assert curve[0] == pytest.approx(one_rank[0], rel=5e-3)


def test_hidden_states_and_the_teachers_table_travel_in_bf16(ranks, world, tmp_path):
    """Full-vocabulary KL, diagnostics and the old-policy pass: TP2 against one rank, with two layouts of the teacher."""
    changes = {"train_iters": 1, "bf16": True, "objective": "full_rkl", "gradient_diagnostics_interval": 1,
               "num_minibatches": 2}  # fmt: skip
    alone = ranks(1).run(reports_here, flags(world, tmp_path / "one", **changes))[0][0]
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "teacher_pipeline_model_parallel_size": 2}
    cut = ranks(2).run(reports_here, flags(world, tmp_path / "two", **changes, **split))[0][0]
    assert cut.loss == pytest.approx(alone.loss, rel=5e-3) and cut.grad_norm == pytest.approx(alone.grad_norm, rel=2e-2)
    norm = "gradient/norm_reverse_kl"
    assert cut.metrics[norm] == pytest.approx(alone.metrics[norm], rel=2e-2)


def test_resuming_is_bit_exact(ranks, world, tmp_path):
    changes = {"train_iters": 3, "save_interval": 2, "bf16": True, "use_distributed_optimizer": True}
    unbroken = ranks(2).run(_train, flags(world, tmp_path / "unbroken", **{**changes, "save_interval": 0}))[0]
    argv = flags(world, tmp_path / "run", **changes)
    first = ranks(2).run(_train, argv, 2)[0]
    assert first + ranks(2).run(_train, argv)[0] == unbroken
