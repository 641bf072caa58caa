"""A run that is closed leaves nothing behind: neither weights nor process groups, whose threads would go on."""

from __future__ import annotations

import re

import pytest

from tests.hf_models import save_hf_checkpoint
from tests.threads_at_end import num_threads
from tests.tiny_run import flags, make_world, train_here
from tests.torchrun_jobs import ROOT, output_from_imports_on, output_of

MODULE = "tests.threads_at_end"


def _threads_around_training(argv):
    """How many of gloo's threads there are before and after a run."""
    from megatron_tropd.parallel.groups import release_groups

    release_groups()
    before = num_threads()
    train_here(argv)
    release_groups()
    return before, num_threads()


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
            assert after == before
        argv = flags(world, tmp_path / "another", train_iters=1, **layout)


def _threads_left(text: str) -> list[str]:
    assert text.endswith("exited with 0"), text
    return re.findall("threads of gloo: (.+)", text)


@pytest.mark.slow
def test_no_thread_of_a_group_outlives_training(tmp_path):
    """A thread that releases the tensors of the last collective while Python ends makes C++ abort the rank."""
    argv = flags(make_world(tmp_path), tmp_path / "run", train_iters=1, tensor_model_parallel_size=2)
    program = str(ROOT / "megatron_tropd/train.py")
    assert _threads_left(output_of([program, *argv], tmp_path, module=MODULE)) == ["0", "0"]


@pytest.mark.slow
def test_no_thread_of_a_group_outlives_a_conversion(tmp_path):
    source = save_hf_checkpoint(tmp_path / "hf", "qwen3", num_hidden_layers=1)
    argv = [str(ROOT / "checkpoint_convert/hf_to_megatron.py"), "--hf-checkpoint", str(source), "--save", "megatron"]
    assert _threads_left(output_of(argv, tmp_path, module=MODULE)) == ["0", "0"]


@pytest.mark.slow
def test_no_thread_of_a_group_outlives_the_example(tmp_path):
    """Its processes import everything themselves: what is imported after there is a group may keep it."""
    argv = [str(ROOT / "examples/own_training_script.py")]
    assert _threads_left(output_from_imports_on(argv, tmp_path, module=MODULE)) == ["0", "0"]
