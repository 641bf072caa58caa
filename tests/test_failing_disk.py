"""A full disk (ENOSPC) and a broken one (EIO) at every file that is written, by real failures of system calls."""

from __future__ import annotations

import errno
import os

import pytest

from megatron_tropd.checkpoints.directory import iterations
from tests import disk_writers
from tests.disk_saves import Case, curve, failing_saves, on_two_ranks
from tests.disk_writers import KINDS
from tests.failing_disk import failing, rule
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import environment, output_of, own_tracebacks

pytestmark = [pytest.mark.slow, pytest.mark.fault(number=6)]
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO}
ADVICE = {"ENOSPC": "free space there", "EIO": "the disk or the file server failed"}


def _cases():
    """A full disk at one call of every kind; the other calls, and a broken disk, where there is time for them."""
    for name, kind in KINDS.items():
        usual = "write" if "write" in kind.calls else kind.calls[0]
        for call in kind.calls:
            for error in ERRORS:
                marks = () if (call, error) == (usual, "ENOSPC") else pytest.mark.thorough
                yield pytest.param(name, call, error, id=f"{name}-{call}-{error}", marks=marks)


@pytest.mark.parametrize(("name", "call", "error"), [*_cases()])
def test_a_file_that_cannot_be_written(disk, tmp_path, name, call, error):
    kind, found = KINDS[name], disk.run(disk_writers.attempt, name, tmp_path, call, ERRORS[error])
    assert found.failures, "nothing failed: the case tests nothing"
    reason = os.strerror(ERRORS[error])
    if kind.goes_on:
        assert found.error is None
        told = [text for text in found.said if kind.named in text and reason in text]
        if name == "metrics":
            assert "its last 3 lines are lost" in told.pop(), "at the end"
        assert len(told) == bool(kind.named), f"told once: {found.said}"
    else:
        assert found.error is not None and reason in found.error and kind.named in found.error, found.error
        assert ADVICE[error] in found.error or "name a directory with space" in found.error, found.error
        assert "\n" not in found.error.strip()
    assert not found.changed, "what was there before is gone or has other bytes"
    assert not found.left, "something is left of what could not be written"
    assert found.again is None, "when the disk works again, so does the writer"


def _log_while_the_disk_is_full(directory):
    """What was said, and the steps in the log: of four, of which the middle two find a full disk."""
    from megatron_tropd.reporting.records import read_records
    from tests.test_reporting_files import create, step_report

    said = []
    with create(directory) as run:
        run.message = said.append
        run.step(step_report(1))
        with failing(rule("*/metrics.jsonl", "write", errno.ENOSPC)):
            run.step(step_report(2))
            run.step(step_report(3))
        run.step(step_report(4))
    return said, [record["step"] for record in read_records(directory / "metrics.jsonl")]


def test_no_line_of_the_log_is_lost_when_there_is_room_again(disk, tmp_path):
    said, steps = disk.run(_log_while_the_disk_is_full, tmp_path)
    assert steps == [1, 2, 3, 4]
    assert len(said) == 2 and "the run goes on" in said[0] and "written again, with the 2 lines" in said[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


SAVES = {
    "shards": ("*iter_0000002.tmp*/*.distcp", "write"),
    "shards of one rank": ("*iter_0000002.tmp*/*.distcp", "write", 1),
    "shards, fsync": ("*iter_0000002.tmp*/*.distcp", "fsync"),
    "shards, close": ("*iter_0000002.tmp*/*.distcp", "close"),
    "folder": ("*/iter_0000002.tmp*", "mkdir"),
    ".metadata": ("*iter_0000002.tmp*/.metadata*", "write"),
    ".metadata, fsync": ("*iter_0000002.tmp*/.metadata*", "fsync"),
    "common.pt": ("*iter_0000002.tmp*/common.pt", "write"),
    "metadata.json": ("*iter_0000002.tmp*/metadata.json", "write"),
    "run.json": ("*iter_0000002.tmp*/run.json*", "write"),
    "hf/": ("*iter_0000002.tmp*/hf/*", "write"),
    "read back": ("*iter_0000002.tmp*/*.distcp", "read"),
    "checkpoint.json": ("*iter_0000002.tmp*/checkpoint.json*", "write"),
    "folder, fsync": ("*/iter_0000002.tmp*", "fsyncdir"),
    "rename": ("*/iter_0000002", "rename"),
    "tracker": ("*/latest_checkpointed_iteration.txt*", "write"),
}


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.thorough)])
def test_a_save_that_fails_ends_on_every_rank_and_the_one_before_is_intact(disk, world, tmp_path, mode):
    """Files that rank 0 alone writes between two collectives too: an error there must not leave rank 1 waiting."""
    argv = flags(
        world, tmp_path / "run", tensor_model_parallel_size=2, train_iters=3, async_save=mode == "async",
        save_interval=1,
    )  # fmt: skip
    cases = {
        f"{name}, {word}": Case(files=files, calls=calls, number=number, rank=rank[0] if rank else -1)
        for word, number in ERRORS.items()
        for name, (files, calls, *rank) in SAVES.items()
    }
    for rank in zip(*disk.run(on_two_ranks, failing_saves, argv, list(cases.values())), strict=True):
        name = next(iter(cases))
        case = cases.pop(name)
        one, other = rank
        assert one.error == other.error and one.failures + other.failures, name
        assert os.strerror(case.number) in one.error and one.error.startswith("CheckpointError: "), (name, one.error)
        assert str(tmp_path / "run" / "checkpoints") in one.error, (name, one.error)
        assert one.intact and not one.left, (name, one)
        assert max(one.seconds, other.seconds) < 60, (name, "a rank waited")


def test_an_emergency_save_is_the_same_state_and_a_run_goes_on_from_it(disk, world, tmp_path, seen):
    """The disk of the checkpoints is full at the second save; the flag names another."""
    common = {"tensor_model_parallel_size": 2, "train_iters": 4, "save_interval": 1}
    whole = disk.run(on_two_ranks, curve, flags(world, tmp_path / "whole", **common))[0][0]
    full = rule("*/run/checkpoints/iter_0000002.tmp*", "write", errno.ENOSPC)
    argv = flags(world, tmp_path / "run", emergency_save=tmp_path / "other", **common)
    one, other = disk.run(on_two_ranks, curve, argv, None, full)
    place = tmp_path / "other" / "run"
    assert one[1] == other[1] and one[1].startswith("SavedElsewhere: ") and "No space left on device" in one[1]
    assert f"The state after step 2 is saved in {place} instead" in one[1] and f"--load {place}" in one[1]
    assert iterations(tmp_path / "run/checkpoints") == [1] and iterations(place) == [2]
    resumed = disk.run(on_two_ranks, curve, [*argv, "--load", str(place)])[0]
    assert resumed[1] == "" and resumed[0] == whole[2:], "bit for bit, and not from the older checkpoint in --save"
    assert iterations(tmp_path / "run/checkpoints") == [1, 3, 4]
    seen(steps_lost=0)
    again = disk.run(on_two_ranks, curve, [*argv, "--load", str(place), "--train-iters", "5"])[0]
    assert len(again[0]) == 1, "what --save has now is newer"


def _job(argv, cwd, *rules):
    """What a job of two ranks prints."""
    return output_of(argv, cwd, environment(FAILING_DISK="\n".join(rules)), "tests.failing_command")


def test_a_run_whose_log_and_report_find_no_room_is_made_to_its_end(disk, world, tmp_path):
    argv = flags(world, tmp_path / "run", train_iters=2, tensor_model_parallel_size=2)
    full = [rule(f"*/run/{files}", "write", errno.ENOSPC) for files in
            ("metrics.jsonl", "rollouts/*", "plots/*", ".report*", ".heartbeat*", "unfinished/*")]  # fmt: skip
    text = disk.run(_job, argv, tmp_path, *full)
    assert text.endswith("exited with 0") and own_tracebacks(text) == 0, text
    for named in (
        "metrics.jsonl cannot",
        "step_0000001.jsonl cannot",
        "heartbeat.json cannot",
        "unfinished rollouts are not",
    ):
        assert text.count(named) >= 1 and text.count(f"{named} be written (No space left on device") <= 2, text
    assert "its last 2 lines are lost" in text and "there is no report of this run.  Write it when" in text
    assert (tmp_path / "run/hf_export/config.json").is_file() and iterations(tmp_path / "run/checkpoints") == [2]


@pytest.mark.thorough
def test_a_job_whose_export_finds_no_room_writes_it_at_the_next_launch(disk, world, tmp_path):
    argv = flags(world, tmp_path / "run", train_iters=1, tensor_model_parallel_size=2)
    text = disk.run(_job, argv, tmp_path, rule("*/hf_export/*", "write", errno.EIO))
    assert text.endswith("exited with 1") and own_tracebacks(text) == 0, text
    assert text.count("cannot be written (Input/output error") == 1 and "The job ends" in text, text
    text = disk.run(_job, argv, tmp_path)
    assert text.endswith("exited with 0") and (tmp_path / "run/hf_export/config.json").is_file(), text


@pytest.mark.thorough
def test_a_job_saves_in_an_emergency_and_says_how_to_go_on(disk, world, tmp_path):
    argv = flags(
        world, tmp_path / "run", train_iters=2, tensor_model_parallel_size=2, save_interval=1,
        emergency_save=tmp_path / "other",
    )  # fmt: skip
    text = disk.run(_job, argv, tmp_path, rule("*/run/checkpoints/*/.metadata*", "fsync", errno.EIO, rank=0))
    assert text.endswith("exited with 1") and own_tracebacks(text) == 0, text
    load = ["--load", str(tmp_path / "other/run")]
    assert text.count("The state after step 1 is saved in") == 1 and " ".join(load) in text, text
    assert "it resumes from the last checkpoint" not in text, "one advice, not two"
    text = disk.run(_job, [*argv, *load], tmp_path)
    assert text.endswith("exited with 0") and iterations(tmp_path / "run/checkpoints") == [2], text
