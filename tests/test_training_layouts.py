"""One run, many layouts: the same loss and gradient norm at every step."""

from __future__ import annotations

import pytest

from tests.tiny_run import flags, make_world, train_here

STEPS = 3
# student TP, PP, sequence parallel, distributed optimizer; teacher TP, PP; ranks
LAYOUTS = {
    "TP1 PP1 DP1": (1, 1, False, False, 1, 1, 1),
    "TP2 PP1 DP1": (2, 1, False, False, 1, 2, 2),
    "TP2 PP1 DP1, sequence parallel": (2, 1, True, False, 2, 1, 2),
    "TP1 PP2 DP1": (1, 2, False, False, 2, 1, 2),
    "TP1 PP1 DP2": (1, 1, False, False, 1, 2, 2),
    "TP1 PP1 DP2, distributed optimizer": (1, 1, False, True, 1, 1, 2),
    "TP2 PP2 DP1": (2, 2, True, False, 4, 1, 4),
    "TP2 PP1 DP2, distributed optimizer": (2, 1, False, True, 2, 2, 4),
}


def _train(argv):
    return train_here(argv)


def _curve(ranks, world, run_dir, layout, **changes):
    tp, pp, sp, distributed, teacher_tp, teacher_pp, size = layout
    argv = flags(
        world, run_dir, train_iters=STEPS, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        sequence_parallel=sp, use_distributed_optimizer=distributed, teacher_tensor_model_parallel_size=teacher_tp,
        teacher_pipeline_model_parallel_size=teacher_pp, **changes,
    )  # fmt: skip
    curves = ranks(size).run(_train, argv)
    assert all(curve == curves[0] for curve in curves), "ranks report different numbers"
    return curves[0]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def reference(ranks, world, tmp_path_factory):
    return _curve(ranks, world, tmp_path_factory.mktemp("run") / "reference", LAYOUTS["TP1 PP1 DP1"])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "TP1 PP1 DP1"])
def test_every_layout_gives_the_same_curve(ranks, world, reference, tmp_path, name, measured):
    curve = _curve(ranks, world, tmp_path / "run", LAYOUTS[name])
    worst = max(abs(a - b) / abs(b) for mine, theirs in zip(curve, reference, strict=True)
                for a, b in zip(mine, theirs, strict=True))  # fmt: skip
    measured(f"loss and gradient norm of {STEPS} steps equal those of one rank, {name} (relative)", worst, 1e-4)


@pytest.mark.parametrize(
    "changes",
    [{"max_tokens_per_microbatch": 300}, {"max_tokens_per_microbatch": 20}, {"logits_chunk_tokens": 3},
     {"recompute_granularity": "full"}, {"deterministic_mode": True}],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()),
)  # fmt: skip
def test_how_the_batch_is_cut_does_not_matter(ranks, world, reference, tmp_path, changes):
    curve = _curve(ranks, world, tmp_path / "run", LAYOUTS["TP1 PP1 DP1"], **changes)
    for mine, theirs in zip(curve, reference, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.fault(number=26)
def test_a_replica_without_a_rollout_makes_the_steps_with_the_others(ranks, world, tmp_path):
    """Two replicas, one rollout in a step."""
    changes = {"rollout_batch_size": 1, "n_samples_per_prompt": 1, "train_iters": 2}
    alone, both = (ranks(size).run(train_here, flags(world, tmp_path / str(size), **changes))[0] for size in (1, 2))
    assert both == [pytest.approx(numbers, rel=1e-5) for numbers in alone]


def test_another_seed_gives_another_curve(ranks, world, reference, tmp_path):
    """Negative control: the comparisons above can fail."""
    curve = _curve(ranks, world, tmp_path / "run", LAYOUTS["TP1 PP1 DP1"], seed=8)
    assert curve[0] != pytest.approx(reference[0], rel=1e-3)


def _modes(argv):
    """What torch is told about determinism while losses are computed, and afterwards."""
    from unittest.mock import patch

    import torch

    from megatron_tropd.training import step

    seen, head_loss = set(), step.head_loss

    def observed(*args, **kwargs):
        seen.add(torch.get_deterministic_debug_mode())
        return head_loss(*args, **kwargs)

    with patch.object(step, "head_loss", observed):
        train_here(argv)
    return sorted(seen), torch.get_deterministic_debug_mode()


@pytest.mark.parametrize(("wanted", "mode"), [(True, 2), (False, 0)])
def test_the_flag_makes_training_steps_strictly_deterministic(ranks, world, tmp_path, wanted, mode):
    argv = flags(world, tmp_path / "run", train_iters=1, deterministic_mode=wanted)
    assert ranks(1).run(_modes, argv) == [([mode], 0)]
