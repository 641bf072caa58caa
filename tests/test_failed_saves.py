"""A save that a kill or a full disk ends, at every stage: the checkpoint before it is whole, and the same command goes on
bit for bit."""

from __future__ import annotations

import hashlib
import json
import time

import pytest

from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import environment, output_of, own_tracebacks

pytestmark = pytest.mark.slow

SAVE = "megatron_tropd.checkpoints.save"
TOTAL = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _argv(world, run_dir, **changes):
    return flags(world, run_dir, tensor_model_parallel_size=2, train_iters=TOTAL, save_interval=1, **changes)


def _steps(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records if r["kind"] == "step"]


def _digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def _tracked(run_dir):
    return (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text().strip()


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory):
    """The steps of a run without a fault, and the export of the trained student."""
    directory = tmp_path_factory.mktemp("unbroken")
    text = output_of(_argv(world, directory / "run"), directory)
    assert text.endswith("exited with 0"), text
    return _steps(directory / "run"), _digests(directory / "run" / "hf_export")


def _goes_on(world, run_dir, directory, unbroken):
    """Seconds that the same command takes to the end; the result is that of the unbroken run."""
    begun = time.monotonic()
    text = output_of(_argv(world, run_dir), directory)
    assert text.endswith("exited with 0"), text
    assert _steps(run_dir) == unbroken[0], "a step is missing, twice or another"
    assert _digests(run_dir / "hf_export") == unbroken[1], "the weights differ"
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir()) == [
        f"iter_{step:07d}" for step in range(1, TOTAL + 1)
    ], "something is left of the save that ended"
    return time.monotonic() - begun


@pytest.mark.parametrize(
    ("at", "argument", "rank", "newest"),
    [
        pytest.param("begin_write", "", "1", "iter_0000001", id="a rank, before its shards",
                     marks=[pytest.mark.fault(number=2), pytest.mark.thorough]),
        pytest.param("write_record", "", "0", "iter_0000001", id="rank 0, after the shards",
                     marks=pytest.mark.fault(number=2)),
        pytest.param("_publish", "", "0", "iter_0000001", id="rank 0, before the rename", marks=pytest.mark.thorough),
        pytest.param("replace_text", "latest_checkpointed", "0", "iter_0000002", id="rank 0, between rename and tracker",
                     marks=pytest.mark.fault(number=3)),
    ],
)  # fmt: skip
def test_a_rank_is_killed_while_it_saves(world, unbroken, tmp_path, seen, at, argument, rank, newest):
    run_dir = tmp_path / "run"
    env = environment(AT=f"{SAVE}:{at}", ON_CALL="2", WITH=argument, KILL_RANK=rank)
    text = output_of(_argv(world, run_dir), tmp_path, env, "tests.ending_command")
    assert text.endswith("exited with 1") and text.count("The job ends") == 1, text
    whole = sorted(p.name for p in (run_dir / "checkpoints").iterdir() if p.is_dir() and ".tmp-" not in p.name)
    assert _tracked(run_dir) == "1" and whole[-1] == newest
    seen(recover_s=_goes_on(world, run_dir, tmp_path, unbroken), steps_lost=1)


@pytest.mark.fault(number=6)
def test_the_disk_is_full_when_it_saves(world, unbroken, tmp_path, seen):
    run_dir = tmp_path / "run"
    env = environment(AT=f"{SAVE}:begin_write", ON_CALL="2", FULL_RANK="1")
    text = output_of(_argv(world, run_dir), tmp_path, env, "tests.ending_command")
    assert text.endswith("exited with 1") and "iter_0000002.tmp-" in text and "The job ends" in text, text
    assert "CheckpointError: cannot write" in text and "GB free, apart from quotas; a full one may" in text, text
    assert own_tracebacks(text) == 0, text
    assert _tracked(run_dir) == "1", "the checkpoint before is still the newest"
    seen(recover_s=_goes_on(world, run_dir, tmp_path, unbroken), steps_lost=1)
