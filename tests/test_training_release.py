"""A run that is closed leaves nothing behind: neither weights nor process groups, whose threads would go on."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from tests.tiny_run import flags, make_world, train_here

KEPT = 3
"""Groups that stay: the world, and two that Megatron's globals keep when they are destroyed."""


def _num_threads() -> int:
    """Of gloo; each of its groups has one."""
    return sum((task / "comm").read_text().strip() == "gloo_tcp_loop" for task in Path("/proc/self/task").iterdir())


def _threads_around_training(argv):
    """How many of gloo's threads there are before and after a run."""
    from megatron_tropd.parallel.groups import release_groups

    before = _num_threads()
    train_here(argv)
    release_groups()
    gc.collect()
    return before, _num_threads()


@pytest.mark.parametrize("family, layout", [
    ("qwen3_tied", {"use_distributed_optimizer": True}),
    ("qwen3", {"tensor_model_parallel_size": 2}),
    ("qwen3_moe", {"expert_model_parallel_size": 2}),
])  # fmt: skip
def test_process_groups_end_with_the_run(ranks, tmp_path, family, layout):
    world = make_world(tmp_path, student=family)
    argv = flags(world, tmp_path / "run", train_iters=1, **layout)
    for _ in range(2):
        for before, after in ranks(2).run(_threads_around_training, argv):
            assert after <= max(before, KEPT)
        argv = flags(world, tmp_path / "another", train_iters=1, **layout)
