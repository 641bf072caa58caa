"""Stopping and going on: bit for bit on the same layout, to 1e-5 on another."""

from __future__ import annotations

import pytest

from tests.tiny_run import flags, make_world, train_here

TOTAL, STOP = 5, 3


def _train(argv, stop_after=None):
    return train_here(argv, stop_after)


def _layout(tp, pp, teacher_tp=1, distributed=False):
    return {
        "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp,
        "teacher_tensor_model_parallel_size": teacher_tp, "use_distributed_optimizer": distributed,
        "train_iters": TOTAL, "save_interval": STOP,
    }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), student="qwen3_tied")


@pytest.fixture(scope="module")
def unbroken(ranks, world, tmp_path_factory):
    """By layout, made on demand: the curve of a run without interruption."""
    root, curves = tmp_path_factory.mktemp("unbroken"), {}

    def curve(size, layout):
        key = repr((size, layout))
        if key not in curves:
            argv = flags(world, root / str(len(curves)), **{**layout, "save_interval": 0})
            curves[key] = ranks(size).run(_train, argv)[0]
        return curves[key]

    return curve


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, _layout(1, 1)),
        (2, _layout(2, 1, 2)),
        (2, _layout(1, 2)),
        (2, _layout(1, 1, distributed=True)),
        (2, {**_layout(2, 1), "num_minibatches": 2, "lr_decay_style": "cosine"}),
    ],
    ids=["TP1", "TP2", "PP2", "DP2 distributed optimizer", "TP2, two minibatches"],
)
def test_resuming_on_the_same_layout_is_bit_exact(ranks, world, unbroken, tmp_path, size, layout, measured):
    argv = flags(world, tmp_path / "run", **layout)
    first = ranks(size).run(_train, argv, STOP)[0]
    rest = ranks(size).run(_train, argv)[0]
    assert len(first) == STOP and len(rest) == TOTAL - STOP
    expected = unbroken(size, layout)
    worst = max(abs(a - b) for mine, theirs in zip(first + rest, expected, strict=True)
                for a, b in zip(mine, theirs, strict=True))  # fmt: skip
    measured("resume on the same layout: loss and gradient norm of every step (absolute)", worst, 0.0)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((1, _layout(1, 1)), (2, _layout(2, 1))), ((2, _layout(1, 2)), (4, _layout(2, 2))),
     ((2, _layout(1, 1, distributed=True)), (2, _layout(2, 1, distributed=True)))],
    ids=["TP1 to TP2", "PP2 to TP2 PP2", "DP2 to TP2, distributed optimizer"],
)  # fmt: skip
@pytest.mark.fault(number=10)
def test_resuming_on_another_layout_gives_the_same_losses(ranks, world, unbroken, tmp_path, saved, loaded, measured):
    ranks(saved[0]).run(_train, flags(world, tmp_path / "run", **saved[1]), STOP)
    rest = ranks(loaded[0]).run(_train, flags(world, tmp_path / "run", **loaded[1]))[0]
    expected = unbroken(*saved)[STOP:]
    worst = max(abs(a[0] - b[0]) / abs(b[0]) for a, b in zip(rest, expected, strict=True))
    measured("resume on another TP x PP: losses (relative)", worst, 1e-5)


def test_changed_prompts_are_refused(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", **_layout(1, 1))
    ranks(1).run(_train, argv, STOP)
    other = tmp_path / "other.jsonl"
    other.write_text((world / "train.jsonl").read_text().replace("w10", "w11"))
    changed = [str(other) if word == str(world / "train.jsonl") else word for word in argv]
    with pytest.raises(AssertionError, match="prompt"):
        ranks(1).run(_train, changed)
