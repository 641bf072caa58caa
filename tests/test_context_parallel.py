"""Context parallelism: the same run as on one rank, and every token of every sequence on exactly one rank."""

from __future__ import annotations

import pytest

from tests.tiny_run import flags, make_world, train_here

STEPS, STOP = 3, 2
CP = {"context_parallel_size": 2}
TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "CP2": (2, CP),
    "CP2 TP2, sequence parallel": (4, {**CP, **TP}),
    "CP2 DP2, distributed optimizer; teacher TP2": (
        4, {**CP, "use_distributed_optimizer": True, "teacher_tensor_model_parallel_size": 2},
    ),
    "CP2 PP2; teacher PP2": (
        4, {**CP, "pipeline_model_parallel_size": 2, "teacher_pipeline_model_parallel_size": 2},
    ),
    "CP4, short micro-batches": (4, {"context_parallel_size": 4, "max_tokens_per_microbatch": 20}),
}  # fmt: skip


def _train(argv, stop_after=None):
    return train_here(argv, stop_after)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(ranks, world, tmp_path_factory):
    """By other flags, made on demand: the curve of one rank."""
    root, curves = tmp_path_factory.mktemp("one"), {}

    def curve(**changes):
        key = repr(changes)
        if key not in curves:
            argv = flags(world, root / str(len(curves)), train_iters=STEPS, **changes)
            curves[key] = ranks(1).run(_train, argv)[0]
        return curves[key]

    return curve


def _curve(ranks, size, argv, stop_after=None):
    curves = ranks(size).run(_train, argv, stop_after)
    assert all(curve == curves[0] for curve in curves), "ranks report different numbers"
    return curves[0]


def _difference(mine, theirs):
    assert len(mine) == len(theirs)
    return max(abs(a - b) / abs(b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_same_curve(ranks, world, reference, tmp_path, name, measured):
    size, changes = LAYOUTS[name]
    curve = _curve(ranks, size, flags(world, tmp_path / "run", train_iters=STEPS, **changes))
    worst = _difference(curve, reference())
    measured(f"loss and gradient norm of {STEPS} steps equal those of one rank, {name} (relative)", worst, 1e-5)
