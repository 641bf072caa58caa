"""--rl-offload-optimizer-during-inference and --teacher-offload: the same numbers, with less memory while engines write."""

from __future__ import annotations

import pytest

from tests.tiny_run import flags, make_world, train_here

pytestmark = pytest.mark.slow

GRPO = {
    "objective": "grpo", "reward_function": "tests.reward_functions:third_of_length", "grpo_kl_coef": 0.1,
    "num_minibatches": 2,
}  # fmt: skip
CASES = {
    "fp32": (1, {}),
    "bf16, TP2": (2, {"bf16": True, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "bf16, distributed optimizer": (2, {"bf16": True, "use_distributed_optimizer": True}),
    "fp32, distributed optimizer, full KL": (2, {"use_distributed_optimizer": True, "objective": "full_rkl"}),
    "grpo: old policy, reference": (1, {"bf16": True, **GRPO}),
}


def _train(argv, stop_after=None):
    return train_here(argv, stop_after)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", CASES)
def test_training_is_bit_identical_with_and_without(ranks, world, tmp_path, name):
    """Also across a checkpoint: the run that sleeps is resumed."""
    size, changes = CASES[name]
    changes = {**changes, "train_iters": 4}
    expected = ranks(size).run(_train, flags(world, tmp_path / "plain", **changes))[0]
    sleeping = {"rl_offload_optimizer_during_inference": True, "teacher_offload": True, "save_interval": 2}
    argv = flags(world, tmp_path / "sleeping", **changes, **sleeping)
    found = ranks(size).run(_train, argv, 2)[0]
    assert found + ranks(size).run(_train, argv)[0] == expected


def _sleep_and_wake(argv):
    """What a student after one step holds (awake, asleep, awake again), its gradients when it woke, and the bytes of
    gradient buffers while the engines wrote."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.parallel import optimizer_memory
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    student, engines = assembled.run.student, assembled.run.engines
    submit, while_writing = engines.submit, []

    def held():
        tensors = optimizer_memory.state_tensors(student.optimizer)
        buffers = [buffer.grad_data.untyped_storage().nbytes() for buffer in student.ddp[0].buffers]
        weights = [parameter.detach().clone() for parameter in student.model.parameters()]
        return [tensor.detach().clone() for tensor in tensors], buffers, weights

    def observed(*args, **more):
        while_writing.append(sum(held()[1]))
        return submit(*args, **more)

    engines.submit = observed
    try:
        push_weights(assembled.run)
        train_step(assembled.run, 0)
        before = held()
        student.sleep()
        student.sleep()  # a second time changes nothing
        asleep = held()
        student.wake()
        after = held()
        student.wake()
        gradients = max(float(buffer.grad_data.abs().max()) for buffer in student.ddp[0].buffers)
    finally:
        close(assembled)
    return before, asleep, after, gradients, while_writing


@pytest.mark.parametrize("distributed", [False, True])
def test_what_sleeps_and_what_stays(ranks, world, tmp_path, distributed):
    import torch

    argv = flags(
        world, tmp_path / "run", bf16=True, use_distributed_optimizer=distributed,
        rl_offload_optimizer_during_inference=True,
    )  # fmt: skip
    before, asleep, after, gradients, while_writing = ranks(1).run(_sleep_and_wake, argv)[0]
    weights = sum(weight.numel() for weight in before[2])
    floats = sum(tensor.numel() for tensor in before[0] if tensor.numel() > 1)
    assert floats >= 3 * weights, "masters and both moments are moved"
    assert all(tensor.numel() == 0 for tensor in asleep[0]) and len(asleep[0]) == len(before[0])
    assert sum(asleep[1]) == 0 and sum(before[1]) >= 4 * weights
    assert all(torch.equal(a, b) for a, b in zip(before[2], asleep[2], strict=True)), "the weights stay"
    assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True))
    assert after[1] == before[1] and gradients == 0
    assert while_writing == [0]


def test_nothing_sleeps_without_the_flag(ranks, world, tmp_path):
    before, asleep, *_, while_writing = ranks(1).run(_sleep_and_wake, flags(world, tmp_path / "run", bf16=True))[0]
    assert [tensor.numel() for tensor in asleep[0]] == [tensor.numel() for tensor in before[0]]
    assert asleep[1] == before[1] and while_writing == [sum(before[1])]
