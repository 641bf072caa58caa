"""--async-save: the bytes of a synchronous save, seen only when they are whole; what fails ends the run."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.checkpoints.directory import find_checkpoint, iterations, latest_iteration, read_metadata
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.safety import read_dcp_metadata
from tests.tiny_run import flags, make_world, train_here

SIZE = 2
LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "DP2, distributed optimizer": {"use_distributed_optimizer": True},
}


def _open(release=None, error=None):
    """What the writer of this rank calls to open a file."""

    def opened(*args):
        if release is not None:
            assert release.wait(60)
        if error is not None:
            raise error
        return open(*args)

    return opened


def _assembled(argv):
    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble
    from megatron_tropd.setup.run_spec import make_run_spec

    return assemble(make_run_spec(parse(argv), SIZE))


def _save_one_step(argv, *, hold=False, error_on=None, error=None):
    """Train a step and save it; what a reader sees while the files are being written, and the error of the save.

    The weights and the optimizer's state change while they are in writing."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_tropd.setup.assemble import close
    from megatron_tropd.training.loop import push_weights, train_step

    release = threading.Event() if hold else None
    assembled = _assembled(argv)
    run, seen, failure = assembled.run, None, None
    try:
        push_weights(run)
        train_step(run, 0)
        filesystem_async.open = _open(release, error if error_on == dist.get_rank() else None)
        try:
            run.checkpoints.save(1, run.student, run.source, None)
            if hold:
                run.checkpoints.finish(wait=False)
                seen = run.checkpoints.in_writing, latest_iteration(run.config.save_dir)
                _spoil(run.student)
                dist.barrier()
                release.set()
            run.checkpoints.finish()
        except CheckpointError as caught:
            failure = str(caught)
        assert not run.checkpoints.in_writing
    finally:
        vars(filesystem_async).pop("open", None)
        close(assembled)
    return seen, failure


@torch.no_grad()
def _spoil(student):
    for parameter in student.model.parameters():
        parameter.fill_(7)
    for optimizer in student._optimizers:
        for state in optimizer.optimizer.state.values():
            for value in state.values():
                value.fill_(7)
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.fill_(7)


def _held_until_step_4(argv):
    """The newest checkpoint that can be seen after each of six steps and at the end; the save of step 3 cannot write
    before step 4 is over."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_tropd.setup.assemble import close
    from megatron_tropd.training.loop import finish_save, push_weights, save_if_due, train_step

    release = threading.Event()
    assembled = _assembled(argv)
    run, seen = assembled.run, []
    filesystem_async.open = _open(release)
    try:
        push_weights(run)
        for step in range(6):
            train_step(run, step)
            save_if_due(run, step + 1)
            dist.barrier()
            seen.append(latest_iteration(run.config.save_dir))
            dist.barrier()
            if step == 3:
                release.set()
                while run.checkpoints.in_writing:
                    finish_save(run, 4, wait=False)
        finish_save(run, 6)
        seen.append(latest_iteration(run.config.save_dir))
    finally:
        vars(filesystem_async).pop("open", None)
        close(assembled)
    return seen


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_are_those_of_a_synchronous_save(ranks, world, tmp_path, layout):
    common = {"save_interval": 1, "train_iters": 2, **LAYOUTS[layout]}
    (none, failure), *_ = ranks(SIZE).run(_save_one_step, flags(world, tmp_path / "sync", **common))
    assert none is None and failure is None
    argv = flags(world, tmp_path / "async", async_save=True, **common)
    for seen, failure in ranks(SIZE).run(_save_one_step, argv, hold=True):
        assert failure is None and seen == (True, None), "not to be seen while it is being written"
    sync, asynchronous = (read_metadata(tmp_path / name / "checkpoints") for name in ("sync", "async"))
    assert {name for name in sync.files if name.endswith(".distcp")}
    assert asynchronous.files.keys() == sync.files.keys()
    differing = [name for name, record in sync.files.items() if asynchronous.files[name] != record]
    assert differing == [".metadata", "run.json"], "the first names its folder, the second the flag"
    before, after = (read_dcp_metadata(find_checkpoint(tmp_path / name / "checkpoints")) for name in ("sync", "async"))
    assert after.state_dict_metadata == before.state_dict_metadata and after.storage_data == before.storage_data


@pytest.mark.fault(number=6)
def test_a_save_that_fails_in_the_background_is_the_error_of_every_rank(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", save_interval=1, train_iters=2, async_save=True, tensor_model_parallel_size=2)
    error = OSError(28, "No space left on device")
    answers = ranks(SIZE).run(_save_one_step, argv, error_on=1, error=error)
    assert answers[0] == answers[1] and "No space left on device" in answers[0][1]
    assert not (tmp_path / "run/checkpoints").exists(), "nothing of it is left"
    answers = ranks(SIZE).run(_save_one_step, argv)
    assert answers[0][1] is None and iterations(tmp_path / "run/checkpoints") == [1]


def test_training_goes_on_meanwhile(ranks, world, tmp_path):
    common = {"train_iters": 6, "save_interval": 3, "keep_last": 1, "tensor_model_parallel_size": 2}
    answers = ranks(SIZE).run(_held_until_step_4, flags(world, tmp_path / "run", async_save=True, **common))
    assert answers == [[None, None, None, None, 3, 3, 6]] * SIZE
    assert iterations(tmp_path / "run/checkpoints") == [6]


def test_the_next_save_waits_for_the_one_before(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", async_save=True, save_interval=1, train_iters=3)
    ranks(SIZE).run(train_here, argv)
    assert iterations(tmp_path / "run/checkpoints") == [1, 2, 3]


def test_a_run_with_it_resumes_bit_for_bit(ranks, world, tmp_path):
    common = {"save_interval": 2, "train_iters": 4, "use_distributed_optimizer": True}
    unbroken = ranks(SIZE).run(train_here, flags(world, tmp_path / "unbroken", **common))[0]
    argv = flags(world, tmp_path / "run", async_save=True, **common)
    first = ranks(SIZE).run(train_here, argv, 2)[0]
    assert iterations(tmp_path / "run/checkpoints") == [2]
    assert first + ranks(SIZE).run(train_here, argv)[0] == unbroken
