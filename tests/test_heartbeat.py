"""The heartbeat of rank 0: which line and file tell a hang from work."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time

import psutil
import pytest

from megatron_tropd.reporting.progress.heartbeat import Activity, Heartbeat, line
from megatron_tropd.reporting.progress.progress import Progress
from megatron_tropd.types import Counts
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import environment, start
from tests.waiting import wait_for

TICK = 0.05


def _read(directory):
    return json.loads((directory / "heartbeat.json").read_text())


@pytest.fixture
def log(tmp_path):
    with (tmp_path / "log").open("w") as stream:
        yield stream


def test_a_long_phase_is_in_the_log_and_in_the_file(tmp_path, log):
    counts = [Counts(done=36, total=128, unit="prompts")]
    with Progress(20, 11, 1, log, run_dir=tmp_path, heartbeat_interval=TICK) as progress:
        progress.begin_step(12)
        with progress.phase("generate", lambda: counts[-1]):
            wait_for(lambda: "36 of 128" in (tmp_path / "log").read_text())
            counts.append(Counts(done=37, total=128, unit="prompts"))
            wait_for(lambda: "37 of 128" in (tmp_path / "log").read_text())
            wait_for(lambda: _read(tmp_path)["counts"]["done"] == 37)
            beat = _read(tmp_path)
        wait_for(lambda: _read(tmp_path)["phase"] == "")
        assert _read(tmp_path)["step"] == 12
    assert (beat["step"], beat["phase"], beat["interval"]) == (12, "generate", TICK)
    assert beat["counts"] == {"done": 37, "total": 128, "unit": "prompts"}
    assert (beat["host"], beat["pid"]) == (os.uname().nodename, os.getpid())
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(re.fullmatch(r"step 12, generate: \d+ s, 3[67] of 128 prompts", text) for text in lines), lines
    assert _read(tmp_path)["phase"] == "ended"


def test_nothing_is_said_of_short_phases(tmp_path, log):
    with Progress(20, 0, 1, log, run_dir=tmp_path, heartbeat_interval=0.5) as progress:
        first = _read(tmp_path)["seconds"]
        for _ in range(12):
            with progress.phase("train"):
                time.sleep(0.1)
        wait_for(lambda: _read(tmp_path)["seconds"] != first or _read(tmp_path)["phase"])
    assert (tmp_path / "log").read_text() == ""


def test_the_phase_around_another_goes_on(tmp_path, log):
    with Progress(20, 0, 1, log, run_dir=tmp_path, heartbeat_interval=TICK) as progress, progress.phase("train"):
        wait_for(lambda: _read(tmp_path)["seconds"] >= 0.3)
        with progress.phase("push"):
            wait_for(lambda: _read(tmp_path)["phase"] == "push")
        wait_for(lambda: _read(tmp_path)["phase"] == "train")
        assert _read(tmp_path)["seconds"] >= 0.3, "its seconds were forgotten"


def test_what_no_longer_changes_is_said():
    activity = Activity(step=3, phase="generate", since=0.0)
    counts = Counts(done=1, total=2, unit="responses")
    assert line(activity, 63.2, counts, 0.0) == "step 3, generate: 63 s, 1 of 2 responses"
    assert line(activity, 180.0, counts, 120.0) == "step 3, generate: 180 s, 1 of 2 responses, none new for 120 s"
    assert line(activity, 180.0, None, 120.0) == "step 3, generate: 180 s"


def test_unchanged_counts_from_the_last_change(tmp_path):
    counts = [Counts(done=0, total=2, unit="responses")]
    activity = Activity(step=1, phase="generate", since=time.monotonic(), counts=lambda: counts[-1])
    heartbeat = Heartbeat(tmp_path, TICK, lambda: activity, lambda _: None)
    heartbeat.start()
    wait_for(lambda: _read(tmp_path)["unchanged"] >= 0.5)
    counts.append(Counts(done=1, total=2, unit="responses"))
    wait_for(lambda: _read(tmp_path)["unchanged"] < 0.3)
    assert _read(tmp_path)["seconds"] >= 0.5
    heartbeat.stop()


@pytest.mark.parametrize("interval", [0.0, 60.0])
def test_no_thread_is_left_and_none_is_made_without_an_interval(tmp_path, log, interval):
    before = threading.active_count()
    with Progress(20, 0, 1, log, run_dir=tmp_path, heartbeat_interval=interval):
        assert threading.active_count() == before + bool(interval)
        assert (tmp_path / "heartbeat.json").exists() == bool(interval)
    assert threading.active_count() == before


def test_a_file_that_cannot_be_written_is_said_once(tmp_path):
    said = []
    heartbeat = Heartbeat(
        tmp_path / "gone", TICK, lambda: Activity(step=1, phase="save", since=time.monotonic()), said.append
    )
    heartbeat.start()
    time.sleep(6 * TICK)
    heartbeat.stop()
    assert len(said) == 1 and "heartbeat.json cannot be written" in said[0]


def test_a_lost_log_does_not_end_the_beats(tmp_path):
    def lost(_):
        raise BrokenPipeError

    activity = Activity(step=1, phase="save", since=time.monotonic() - 10)
    heartbeat = Heartbeat(tmp_path, TICK, lambda: activity, lost)
    heartbeat.start()
    wait_for(lambda: _read(tmp_path)["seconds"] >= 10.3)
    heartbeat.stop()


def _counts_of_a_step(argv):
    """(phase, counts at its begin, counts at its end) of the phases of a run's second step, on rank 0."""
    import contextlib
    from dataclasses import replace

    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.reporting.progress.progress import NullProgress
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    seen = []

    class Recorder(NullProgress):
        @contextlib.contextmanager
        def phase(self, name, counts=None):
            first = counts and counts()
            yield
            seen.append((name, first, counts and counts()))

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    try:
        run = replace(assembled.run, progress=Recorder())
        push_weights(run)
        train_step(run, 0)
        seen.clear()
        train_step(run, 1)
    finally:
        close(assembled)
    return seen


@pytest.mark.slow
def test_the_phases_of_a_step_count(ranks, tmp_path):
    argv = flags(make_world(tmp_path / "world"), tmp_path / "run", max_tokens_per_microbatch=24)
    seen = ranks(2).run(_counts_of_a_step, argv)[0]
    assert [name for name, *_ in seen] == ["generate", "score", "train", "train", "push"]
    by_phase = {name: (first, last) for name, first, last in seen if last}
    assert by_phase["generate"][1] == Counts(done=4, total=4, unit="responses on this rank")
    (first, last) = by_phase["train"]
    assert first.done == 0 and first.total > 1 and last.done == last.total == first.total
    assert last.unit == "micro-batches"


@pytest.mark.slow
def test_a_slow_phase_and_a_stopped_process_of_a_real_job(tmp_path):
    """Rank 0 of a torchrun job stands in its reward function; then the whole process is stopped."""
    world = make_world(tmp_path / "world")
    run_dir, gate = tmp_path / "run", tmp_path / "gate"
    argv = flags(
        world, run_dir, objective="grpo", guidance="none", reward_function="tests.reward_functions:when_the_gate_opens",
        teacher_hf_checkpoint=None, guidance_beta=None, top_k=None, train_iters=2, heartbeat_interval=0.2,
    )  # fmt: skip
    with start(argv, tmp_path, environment(REWARD_GATE=str(gate))) as job:
        log = tmp_path / "log"
        wait_for(lambda: "step 1, score: 1 s" in log.read_text(), job)
        rank = psutil.Process(_read(run_dir)["pid"])
        assert job.pid in [parent.pid for parent in rank.parents()], "the file names another process"
        old = _read(run_dir)
        assert (old["step"], old["phase"]) == (1, "score")
        rank.suspend()
        before = (run_dir / "heartbeat.json").stat().st_mtime_ns
        time.sleep(1.0)
        assert (run_dir / "heartbeat.json").stat().st_mtime_ns == before, "a stopped process has a heart that beats"
        rank.resume()
        wait_for(lambda: (run_dir / "heartbeat.json").stat().st_mtime_ns != before, job, timeout=20)
        gate.touch()
        assert job.wait(timeout=200) == 0, job.output[-3000:]
    ended = _read(run_dir)
    assert (ended["phase"], ended["step"]) == ("ended", 2)
    assert sys.platform != "linux" or not psutil.pid_exists(ended["pid"])
