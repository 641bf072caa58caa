"""A teacher on ranks of its own gives the run that the same teacher on the student's ranks gives."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.data.rollout_codec import decode_rollouts, encode_rollouts
from megatron_tropd.parallel.mailbox import Mailbox, Message
from megatron_tropd.parallel.roles import Job, split
from megatron_tropd.parallel.side_group import host_store, join_store
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.types import Rollout
from tests.hf_models import read_tensors, write_tensors
from tests.tiny_run import flags, make_world, train_here
from tests.torchrun_jobs import environment, output_of

pytestmark = pytest.mark.slow

STEPS = 3
TOLERANCE = 1e-5
# student and teacher: what is added to the run; ranks of the teacher, ranks of the job
LAYOUTS = {
    "student TP2, teacher PP2": (
        {"tensor_model_parallel_size": 2, "teacher_pipeline_model_parallel_size": 2}, 2, 4
    ),
    "student PP2, teacher TP2": (
        {"pipeline_model_parallel_size": 2, "teacher_tensor_model_parallel_size": 2}, 2, 4
    ),
    "student DP2, teacher DP2, two updates": ({"num_minibatches": 2}, 2, 4),
    "student DP1, teacher TP2 PP2": (
        {"teacher_tensor_model_parallel_size": 2, "teacher_pipeline_model_parallel_size": 2}, 4, 5
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _curve(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def _dedicated(world, run_dir, tmp_path, teachers, ranks, **changes):
    argv = flags(
        world, run_dir, teacher_placement="dedicated", teacher_world_size=teachers, **{"train_iters": STEPS, **changes}
    )
    output = output_of(argv, tmp_path, ranks=ranks)
    assert "torchrun exited with 0" in output, output
    return _curve(run_dir)


def _worst(mine, theirs):
    assert len(mine) == len(theirs)
    return max(abs(a - b) / abs(b) for m, t in zip(mine, theirs, strict=True) for a, b in zip(m, t, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_losses_and_gradients_are_those_of_a_colocated_teacher(ranks, world, tmp_path, measured, name):
    changes, teachers, size = LAYOUTS[name]
    student = {key: value for key, value in changes.items() if not key.startswith("teacher_")}
    here = ranks(size - teachers).run(train_here, flags(world, tmp_path / "here", train_iters=STEPS, **student))[0]
    there = _dedicated(world, tmp_path / "there", tmp_path, teachers, size, **changes)
    measured(f"loss and gradient norm with a dedicated teacher, {name} (relative)", _worst(there, here), TOLERANCE)


def test_a_teacher_with_experts(ranks, tmp_path, measured):
    world = make_world(tmp_path / "world", teacher="qwen3_moe")
    here = ranks(1).run(train_here, flags(world, tmp_path / "here", train_iters=STEPS))[0]
    there = _dedicated(world, tmp_path / "there", tmp_path, 2, 3, teacher_expert_model_parallel_size=2)
    measured("loss and gradient norm with a dedicated teacher, EP 2 (relative)", _worst(there, here), TOLERANCE)


@pytest.mark.parametrize("objective", ["full_rkl", "topk_rkl"])
def test_what_other_methods_ask_for_crosses_over_too(ranks, world, tmp_path, measured, objective):
    """Between a TP 2 teacher and a TP 2 student: hidden states and the output table, and the student's own top-k."""
    changes = {"objective": objective, "tensor_model_parallel_size": 2}
    here = ranks(2).run(train_here, flags(world, tmp_path / "here", train_iters=STEPS, **changes))[0]
    there = _dedicated(
        world, tmp_path / "there", tmp_path, 2, 4, teacher_tensor_model_parallel_size=2, **changes
    )  # fmt: skip
    measured(f"{objective} with a dedicated teacher (relative)", _worst(there, here), TOLERANCE)


def test_a_teacher_that_gives_nan_ends_the_run_with_its_name(world, tmp_path):
    broken = make_world(tmp_path / "world")
    tensors = read_tensors(broken / "teacher")
    tensors["model.norm.weight"][:] = float("nan")
    write_tensors(broken / "teacher", tensors)
    argv = flags(broken, tmp_path / "run", teacher_placement="dedicated", teacher_world_size=1)
    output = output_of(argv, tmp_path)
    assert "the teacher (--teacher-hf-checkpoint" in output and "gives short sequences NaN" in output, output
    assert "torchrun exited with 1" in output


@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_run_goes_on_from_rollouts_that_a_failing_teacher_did_not_score(world, tmp_path, measured, lag):
    whole = _dedicated(world, tmp_path / "whole", tmp_path, 1, 2, train_iters=4, rollout_lag=lag)
    argv = flags(
        world, tmp_path / "run", teacher_placement="dedicated", teacher_world_size=1, train_iters=4, rollout_lag=lag
    )
    output = output_of(argv, tmp_path, environment(FAIL_AFTER="2"), "tests.failing_teacher")
    failed = re.search(r"The rollouts of step (\d) are saved, with the state before the step", output)
    assert failed and "NaN" in output and "torchrun exited with 1" in output, output
    step = int(failed[1])  # with a lag, the batch of step 3 may have been scored before
    assert step in ({3, 4} if lag else {3}) and len(_curve(tmp_path / "run")) == step - 1
    assert "torchrun exited with 0" in output_of(argv, tmp_path)
    worst = _worst(_curve(tmp_path / "run"), whole)
    measured("a run that goes on from rollouts a dedicated teacher did not score (relative)", worst, TOLERANCE)


def test_worlds_with_different_settings_are_told(world, tmp_path):
    """As nodes that read different files would have them."""
    argv = flags(world, tmp_path / "run", teacher_placement="dedicated", teacher_world_size=1)
    output = output_of(argv, tmp_path, environment(OTHER_TOP_K="7"), "tests.other_settings")
    assert "--top-k is 5 on rank 0 and 7 on rank 1; give every node the same flags" in output, output
    assert "torchrun exited with 1" in output


@pytest.mark.parametrize(
    ("changes", "size", "expected"),
    [
        ({"teacher_placement": "dedicated"}, 4, r"needs --teacher-world-size: how many of the 4 ranks"),
        ({"teacher_world_size": 2}, 4, r"--teacher-world-size 2 is for --teacher-placement dedicated"),
        ({"teacher_placement": "dedicated", "teacher_world_size": 2}, 2, r"leaves no rank for the student"),
        ({"teacher_placement": "dedicated", "teacher_world_size": 2, "objective": "sft", "guidance": "none"}, 4,
         r"--objective sft has no teacher"),
        ({"teacher_placement": "dedicated", "teacher_world_size": 3, "teacher_tensor_model_parallel_size": 2}, 4,
         r"--teacher-tensor-model-parallel-size 2 .* does not divide the 3 ranks"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_starts(world, tmp_path, changes, size, expected):
    with pytest.raises(ConfigError, match=expected):
        make_run_spec(parse(flags(world, tmp_path / "run", **changes)), size)


def test_roles_are_consecutive_ranks():
    roles = split(7, [("teacher", 2), ("judge", 1)])
    assert [(role.name, role.first, role.size) for role in roles] == [
        ("trainer", 0, 4), ("teacher", 4, 2), ("judge", 6, 1),
    ]  # fmt: skip
    assert [Job(roles=roles, rank=rank).role.name for rank in (0, 3, 4, 5, 6)] == [
        "trainer", "trainer", "teacher", "teacher", "judge",
    ]  # fmt: skip


def test_a_mailbox_keeps_order_and_large_messages():
    store = host_store(timeout_s=30.0)

    def connect() -> dist.TCPStore:
        return join_store(port=store.port, timeout_s=30.0)

    reader, writers = Mailbox("box", connect), [Mailbox("box", connect) for _ in range(2)]
    large = bytes(range(256)) * (40 << 10)  # 10 MiB, more than the store takes at one time

    def post(writer: Mailbox, number: int) -> None:
        for count in range(20):
            writer.post(Message(kind="m", values={"from": number, "count": count}, data=large if count == 7 else b"x"))

    threads = [threading.Thread(target=post, args=(writer, i)) for i, writer in enumerate(writers)]
    for thread in threads:
        thread.start()
    found = []
    while len(found) < 40:
        message = reader.take(60.0)
        assert message is not None, f"{len(found)} of 40 messages arrived"
        found.append(message)
    for thread in threads:
        thread.join()
    assert reader.take(0.05) is None
    for number in range(2):
        mine = [m for m in found if m.values["from"] == number]
        assert [m.values["count"] for m in mine] == list(range(20)), "one sender's messages stay in order"
        assert mine[7].data == large and mine[8].data == b"x"
    assert not [key for key in ("box/0", "box/0/0", "box/39") if store.check([key])], "read messages are deleted"


def test_rollouts_come_back_bit_by_bit():
    rollouts = [
        Rollout(
            prompt_uid=uid, sample_index=uid + 1, token_ids=tuple(range(5 + uid)), prompt_len=2, guidance_len=uid,
            logprobs=tuple(-(i + 1) / 3 for i in range(3)), weight_version=(uid, uid + 2), finish=finish,
        )
        for uid, finish in enumerate(("stop", "length", "abort"))
    ]  # fmt: skip
    assert decode_rollouts(encode_rollouts(rollouts)) == rollouts
    ids = torch.arange(6, dtype=torch.int32).reshape(3, 2)
    mixed = [rollouts[0], replace(rollouts[1], topk_ids=ids), rollouts[2], replace(rollouts[0], topk_ids=ids[:, :1])]
    back = [rollout.topk_ids for rollout in decode_rollouts(encode_rollouts(mixed))]
    assert back[0] is None and torch.equal(back[1], ids) and back[2] is None and torch.equal(back[3], ids[:, :1])
    assert decode_rollouts(encode_rollouts([])) == []
    with pytest.raises(ValueError, match="not a batch of rollouts"):
        decode_rollouts(b"garbage")
