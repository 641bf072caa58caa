"""Rollouts of an unfinished batch: on disk as they finish, and used again only with the weights that wrote them."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest

from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.training.spool import FOLDER, Spool
from megatron_tropd.types import GenerationRequest, Rollout
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import output_of, start
from tests.waiting import wait_for

REQUESTS = [
    GenerationRequest(prompt_uid=uid, sample_index=0, token_ids=(5, 6, uid), prompt_len=2, guidance_len=1,
                      max_new_tokens=4) for uid in range(4)
]  # fmt: skip
SAMPLING = SamplingParams(seed=1, step=7)


def _rollout(index, version=3):
    request = REQUESTS[index]
    return Rollout(
        prompt_uid=request.prompt_uid, sample_index=0, token_ids=(*request.token_ids, 9, 8), prompt_len=2,
        guidance_len=1, logprobs=(-0.1, -0.25), weight_version=(version, version), finish="stop",
    )  # fmt: skip


class _Launch:
    """A spool, and what it says."""

    def __init__(self, folder, weights="a"):
        self.said = []
        self.spool = Spool(folder, lambda: weights, "", self.said.append)

    def begin(self, requests=REQUESTS, sampling=SAMPLING, version=3):
        return self.spool.begin(requests, sampling, version)


@pytest.fixture
def killed(tmp_path):
    """A folder in which a launch left two of four rollouts."""
    launch = _Launch(tmp_path)
    assert launch.begin() == {} and not launch.said
    launch.spool.add({2: _rollout(2)})
    launch.spool.add({0: _rollout(0)})
    return tmp_path


def test_a_launch_with_the_same_weights_goes_on(killed):
    launch = _Launch(killed)
    assert launch.begin() == {0: _rollout(0), 2: _rollout(2)}
    assert launch.said == ["step 8: 2 of 4 rollouts were finished by an earlier launch"]
    launch.spool.add({1: _rollout(1)})
    assert sorted(_Launch(killed).begin()) == [0, 1, 2], "a second kill loses nothing either"


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "b"}, {"version": 4}, {"sampling": dataclasses.replace(SAMPLING, step=8)},
        {"sampling": dataclasses.replace(SAMPLING, seed=2)}, {"requests": REQUESTS[:3]},
    ],
    ids=["weights", "version", "step", "seed", "requests"],
)  # fmt: skip
def test_anything_else_begins_anew_and_deletes_them(killed, change):
    launch = _Launch(killed, change.pop("weights", "a"))
    assert launch.begin(**change) == {} and not list(killed.iterdir()) and not launch.said


def test_what_is_cut_or_damaged_is_not_used(killed):
    (path,) = killed.iterdir()
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        assert set(_Launch(killed).begin()) <= {2}
    for at in range(0, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = _Launch(killed).begin()
        assert all(rollout == _rollout(index) for index, rollout in found.items())


def test_a_trained_batch_leaves_nothing(killed):
    launch = _Launch(killed)
    launch.begin()
    launch.spool.add({1: _rollout(1)})
    launch.spool.clear()
    assert not list(killed.iterdir())
    launch.spool.add({3: _rollout(3)})  # too late
    assert _Launch(killed).begin(version=4) == {} and not list(killed.iterdir())


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    launch = _Launch(tmp_path)
    launch.begin()
    launch.spool._file.path = launch.spool._file.path.parent / "full"
    launch.spool._file.path.symlink_to("/dev/full")
    launch.spool.add({0: _rollout(0)})
    launch.spool.add({1: _rollout(1)})
    assert len(launch.said) == 1 and "unfinished rollouts are not kept" in launch.said[0]
    launch.begin()
    assert len(launch.said) == 1, "once a batch"


def _batches_on_rank(folders):
    """Three batches on this rank: what it says."""
    import torch.distributed as dist

    launch = _Launch(folders[dist.get_rank()])
    for _ in range(3):
        launch.begin()
        launch.spool.add({0: _rollout(0)})
    return launch.said


def test_the_first_rank_says_what_others_cannot_keep(ranks, tmp_path):
    (tmp_path / "file").touch()
    said, silent = ranks(2).run(_batches_on_rank, [tmp_path / "folder", tmp_path / "file"])
    assert [line.partition(str(tmp_path / "file"))[0] for line in said] == [
        "warning: unfinished rollouts were not kept on 1 of 2 ranks; rank 1: "
    ] * 2, said  # at the beginning of the next batch
    assert [line.partition(": unfinished")[0] for line in silent] == ["warning"] * 5  # shown by no rank but the first


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _digests(argv, changed_bits):
    """On this rank: digests of the student's weights, with one bit changed each time, and at last as they were."""
    import torch
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.models import make_student
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.weights_digest import weights_digest
    from megatron_tropd.weights.coordinates.parameters import local_parameters

    student = make_student(make_run_spec(parse(argv), dist.get_world_size()))
    tensors = [tensor for _, tensor in sorted(local_parameters(student.model).items())]
    found = [weights_digest(student)]
    for rank, number, at, bit in changed_bits:
        if dist.get_rank() == rank:
            tensors[number].data.flatten().view(torch.int32)[at] ^= 1 << bit
        found.append(weights_digest(student))
        if dist.get_rank() == rank:
            tensors[number].data.flatten().view(torch.int32)[at] ^= 1 << bit
    with torch.no_grad():  # two values change places: the plain sum is the same
        flat = tensors[0].data.flatten()
        flat[0], flat[1] = flat[1].clone(), flat[0].clone()
    found.append(weights_digest(student))
    with torch.no_grad():
        flat[0], flat[1] = flat[1].clone(), flat[0].clone()
    found.append(weights_digest(student))
    student.close()
    return found


@pytest.mark.slow
def test_the_digest_sees_every_bit_of_every_rank(ranks, world, tmp_path):
    changes = [(0, 0, 0, 0), (1, 3, 2, 31), (1, 0, 5, 12)]
    argv = flags(world, tmp_path / "run", tensor_model_parallel_size=2)
    found, other = ranks(2).run(_digests, argv, changes)
    assert found == other, "every rank has the same"
    assert found[0] == found[-1] and len(set(found)) == len(found) - 1


def _steps(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "step"]


@pytest.mark.slow
def test_a_job_that_is_killed_while_it_writes_goes_on_from_what_it_has(world, tmp_path, measured):
    changes = {"tensor_model_parallel_size": 2, "train_iters": 2, "rollout_max_batch_size": 2, "save_interval": 1,
               "rollout_batch_size": 24}  # fmt: skip
    whole = output_of(flags(world, tmp_path / "whole", **changes), tmp_path)
    assert whole.endswith("exited with 0"), whole
    run_dir = tmp_path / "run"
    argv = flags(world, run_dir, **changes)
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"

    def writes_second_step():
        return tracker.exists() and sum(path.stat().st_size for path in (run_dir / FOLDER).glob("*")) > 2000

    with start(argv, tmp_path) as job:
        wait_for(writes_second_step, job)
        for process in _family(job.pid):
            process.kill()
        job.wait(timeout=60)
    assert [step for step, *_ in _steps(run_dir)] == [1]
    text = output_of(argv, tmp_path)
    assert text.endswith("exited with 0") and text.count("rollouts were finished by an earlier launch") == 1, text
    assert "step 2: " in text
    worst = max(abs(a / b - 1) for mine, theirs in zip(_steps(run_dir), _steps(tmp_path / "whole"), strict=True)
                for a, b in zip(mine, theirs, strict=True))  # fmt: skip
    measured("a run that goes on from unfinished rollouts equals the unbroken one (relative)", worst, 1e-6)
    assert not list((run_dir / FOLDER).glob("*"))


def _family(pid):
    import psutil

    parent = psutil.Process(pid)
    return [*parent.children(recursive=True), parent]
