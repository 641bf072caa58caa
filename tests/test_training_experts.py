"""A student with experts, whole runs: the same loss and gradient norm in every layout."""

from __future__ import annotations

import pytest

from tests.tiny_run import flags, make_world, train_here

STEPS = 3
LAYOUTS = {
    "TP2, sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "DP2, distributed optimizer": (2, {"use_distributed_optimizer": True}),
    "CP2": (2, {"context_parallel_size": 2}),
    "CP2 EP2": (2, {"context_parallel_size": 2, "expert_model_parallel_size": 2}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "EP2": (2, {"expert_model_parallel_size": 2}),
    "PP2 EP2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
    "TP2 EP2, one expert on one rank": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), student="qwen3_moe")


@pytest.fixture(scope="module")
def reference(ranks, world, tmp_path_factory):
    return ranks(1).run(train_here, flags(world, tmp_path_factory.mktemp("run") / "r", train_iters=STEPS))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_curve(ranks, world, reference, tmp_path, name, measured):
    size, changes = LAYOUTS[name]
    for curve in ranks(size).run(train_here, flags(world, tmp_path / "run", train_iters=STEPS, **changes)):
        worst = max(abs(a - b) / abs(b) for mine, theirs in zip(curve, reference, strict=True)
                    for a, b in zip(mine, theirs, strict=True))  # fmt: skip
        measured(f"loss and gradient norm of qwen3_moe equal those of one rank, {name} (relative)", worst, 1e-4)
