"""--fallback-previous: which checkpoint is taken where the newest is damaged, on every rank alike, and what is said."""

from __future__ import annotations

import json
import shutil

import pytest

from megatron_tropd.checkpoints.directory import TRACKER_FILE, iterations
from megatron_tropd.checkpoints.fallback import Choice, newest_whole, set_aside
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.reporting.run_directory import RunDirectory
from tests.tiny_run import flags, make_world, outcome_here

STEPS = 4


def _choose(directory):
    try:
        choice = newest_whole(directory)
    except CheckpointError as error:
        return str(error)
    return None if choice is None else (choice.step, choice.note)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(ranks, world, tmp_path_factory):
    """A run of four steps with a checkpoint after each of the first three."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ((error, *_),) = ranks(1).run(outcome_here, flags(world, run, save_interval=1), STEPS - 1)
    assert error is None
    return run


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def _flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def _shard(folder):
    return sorted(folder.glob("*.distcp"))[0]


DAMAGE = {
    "missing shard": (lambda saved, newest: _shard(newest).unlink(), "is missing; the checkpoint is incomplete"),
    "wrong digest": (lambda saved, newest: _flip(_shard(newest)), "is damaged: its sha256 is"),
    "short .metadata": (
        lambda saved, newest: (newest / ".metadata").write_bytes((newest / ".metadata").read_bytes()[:-7]),
        "bytes were saved|were saved; it is damaged",
    ),
    "short checkpoint.json": (
        lambda saved, newest: (newest / "checkpoint.json").write_text('{"format"'), "checkpoint.json is damaged",
    ),
    "damaged run.json": (lambda saved, newest: (newest / "run.json").write_text("{}"), "run.json has 2 bytes"),
    "missing iteration": (lambda saved, newest: shutil.rmtree(newest), "names iteration 3, but .* does not exist"),
    "empty tracker": (lambda saved, newest: (saved / TRACKER_FILE).write_text(""), "is empty; expected an iteration"),
    "no tracker": (lambda saved, newest: (saved / TRACKER_FILE).unlink(), f"has no {TRACKER_FILE}"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.fault(number=8)
def test_every_rank_takes_the_newest_that_verifies(ranks, run, damage):
    saved = run / "checkpoints"
    apply, reason = DAMAGE[damage]
    assert ranks(2).run(_choose, saved) == [(3, "")] * 2
    apply(saved, saved / "iter_0000003")
    choices = ranks(2).run(_choose, saved)
    assert choices[0] == choices[1], "every rank decides alike"
    step, note = choices[0]
    whole = damage in ("empty tracker", "no tracker")
    assert step == (3 if whole else 2)
    assert f"resuming from step {step}" in note
    assert ("no saved step is lost" if whole else "1 saved step is lost and made again") in note
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(note)


def test_several_damaged_ones_are_all_named(ranks, run):
    saved = run / "checkpoints"
    _flip(_shard(saved / "iter_0000003"))
    _shard(saved / "iter_0000002").unlink()
    step, note = ranks(2).run(_choose, saved)[0]
    assert step == 1 and "2 saved steps are lost and made again" in note
    assert "its sha256 is" in note and "is missing; the checkpoint is incomplete" in note
    (saved / "iter_0000001/common.pt").unlink()
    error = ranks(2).run(_choose, saved)[1]
    assert "no checkpoint in" in error and "is whole:" in error and error.count("\n") == 3
    shutil.rmtree(saved)
    assert ranks(2).run(_choose, saved) == [None] * 2


@pytest.mark.parametrize("damage", ["wrong digest", "short checkpoint.json", "damaged run.json", "empty tracker"])
def test_without_the_flag_the_error_names_it_and_the_checkpoint(ranks, world, run, damage):
    saved = run / "checkpoints"
    DAMAGE[damage][0](saved, saved / "iter_0000003")
    error, _, _ = ranks(1).run(outcome_here, flags(world, run, save_interval=1))[0]
    whole = "iter_0000003" if damage == "empty tracker" else "iter_0000002"
    assert f"has all its files is {saved / whole}: --fallback-previous resumes from it" in error


@pytest.mark.fault(number=7)
def test_a_run_goes_on_from_the_earlier_one(ranks, world, run):
    saved = run / "checkpoints"
    with RunDirectory.create(run, config={}, resume=True) as directory:  # what a run writes after its third step
        directory.rollouts(3, [])
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": "step", "step": step, "loss": 0.0}) + "\n" for step in (1, 2, 3, 4))
    )
    _flip(_shard(saved / "iter_0000003"))
    argv = flags(world, run, save_interval=1, fallback_previous=True)
    error, printed, steps = ranks(1).run(outcome_here, argv, 3)[0]
    assert error is None and steps == [3]
    assert f"warning: resuming from step 2 in {saved}; 1 saved step is lost and made again" in printed
    assert printed.count("its sha256 is") == 1
    logged = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged == [1, 2] and not list((run / "rollouts").iterdir()), "reports_here writes no lines of its own"
    error, printed, steps = ranks(1).run(outcome_here, argv)[0]  # the damaged one was replaced
    assert error is None and steps == [4] and "warning: resuming" not in printed


def test_damaged_ones_lose_their_names_and_count_no_more(tmp_path):
    for step in (20, 37, 40):
        (tmp_path / f"iter_{step:07d}").mkdir()
    set_aside(tmp_path, Choice(step=20, refused=(37, 40)))
    assert iterations(tmp_path) == [20]
    assert sorted(path.name.split("-")[0] for path in tmp_path.glob("*.damaged*")) == [
        "iter_0000037.damaged", "iter_0000040.damaged",
    ]  # fmt: skip
    set_aside(tmp_path, Choice(step=20, refused=(37,)))  # gone already
