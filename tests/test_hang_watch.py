"""A rank that no longer answers, and a job that does not get on: found by a deadline of their own, and named."""

from __future__ import annotations

import dataclasses
import re
import signal
import threading
import time
from datetime import timedelta

import psutil
import pytest

from megatron_tropd.parallel.beats import Beat, Judge, describe
from megatron_tropd.parallel.hang_watch import Doing, HangWatch
from megatron_tropd.types import Counts
from tests.ranks import free_port
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import environment, start, wait_for_steps
from tests.waiting import wait_for


def _beat(rank, number, **changes):
    values = {"step": 3, "phase": "train", "seconds": 1.0, "counts": None}
    return Beat(rank=rank, host=f"n{rank // 4}", pid=100 + rank, number=number, **{**values, **changes})


def test_a_beat_is_what_it_was():
    beat = _beat(1, 2, counts=Counts(done=1, total=3, unit="responses"))
    assert Beat.decode(beat.encode()) == beat


def _looks(judge, until_s, beats):
    """(seconds, hang) of the first look that finds one; a look every second."""
    for now in range(1, until_s):
        if hang := judge.look(beats(now), float(now)):
            return now, hang
    return None


def test_a_rank_whose_beats_stay_away_is_silent():
    def beats(now):
        return {0: _beat(0, now), 1: _beat(1, min(now, 10)), 2: _beat(2, 5, ended=True)}

    now, hang = _looks(Judge(range(3), 30.0, 0.0), 100, beats)
    assert now == 41 and hang.silent == {1: 31.0}


def test_a_job_that_does_not_get_on_is_stuck_and_one_that_counts_is_not():
    def counting(now):
        return {0: _beat(0, now), 1: _beat(1, now, counts=Counts(done=now // 20, total=9, unit="responses"))}

    assert _looks(Judge(range(2), 30.0, 25.0), 200, counting) is None
    now, hang = _looks(
        Judge(range(2), 30.0, 25.0), 200, lambda now: counting(min(now, 50)) | {0: _beat(0, now), 1: _beat(1, now)}
    )
    assert hang.silent == {} and now == 27
    assert _looks(Judge([0], 0.0, 0.0), 200, lambda _: {0: _beat(0, 1)}) is None, "0: never"


def test_a_rank_that_never_beats_is_silent_too():
    now, hang = _looks(Judge(range(2), 30.0, 0.0), 100, lambda now: {0: _beat(0, now)})
    assert now == 32 and hang.silent == {1: 31.0}
    assert "  rank 1: silent for 31 s; it has not begun: its process" in describe(hang, {0: _beat(0, 1)}, {})


def test_a_judge_that_stood_still_itself_accuses_nobody():
    judge = Judge([1], 30.0, 60.0)
    assert judge.look({1: _beat(1, 1)}, 10.0) is None
    assert judge.look({1: _beat(1, 1)}, 1000.0) is None, "the whole machine may have been stopped"
    assert not any(judge.look({1: _beat(1, 2)}, now) for now in (1010.0, 1020.0, 1030.0, 1040.0))
    assert judge.look({1: _beat(1, 2)}, 1041.0).silent == {1: 31.0}


def test_what_is_said():
    beats = {rank: _beat(rank, 9, seconds=200.0) for rank in range(6)}
    beats[3] = _beat(3, 4, phase="score", seconds=20.0, counts=Counts(done=2, total=5, unit="responses"))
    beats[5] = _beat(5, 9, ended=True)
    judge = Judge(range(6), 30.0, 0.0)
    judge.look(beats, 1.0)
    later = {rank: dataclasses.replace(beat, number=10) if rank != 3 else beat for rank, beat in beats.items()}
    for now in range(2, 33):
        hang = judge.look(later | {0: dataclasses.replace(later[0], number=10 + now)} | {
            rank: dataclasses.replace(later[rank], number=10 + now) for rank in (1, 2, 4)}, float(now))  # fmt: skip
    text = describe(hang, beats, dict.fromkeys((0, 1, 2), "training/step.py:12, forward"))
    assert text.splitlines() == [
        "Hang: rank 3 no longer answers",
        "  rank 3 (n0, pid 103): silent for 31 s; last in step 3, score (2 of 5 responses): its process is stopped, its "
        "machine is lost, or code holds Python's interpreter lock",
        "  ranks 0-2: in step 3, train for 200 s, at training/step.py:12, forward",
        "  rank 4: in step 3, train for 200 s",
    ]


@pytest.fixture
def store():
    import torch.distributed as dist

    port = free_port()
    server = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    yield lambda: dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
    del server


def _watches(store, tmp_path, doing, **deadlines):
    """Two ranks of this process, and the errors that they end with."""
    errors = {}
    watches = [
        HangWatch(rank, 2, [0, 1], store, doing[rank], folder=tmp_path, end=lambda e, rank=rank: errors.update({rank: e}),
                  **{"silence_s": 0.0, "stuck_s": 0.0, **deadlines})
        for rank in range(2)
    ]  # fmt: skip
    return watches, errors


def test_both_ranks_of_a_stuck_job_end_with_the_same_text_and_all_stacks(store, tmp_path):
    def stuck():
        return Doing(step=7, phase="push", seconds=3.0)

    watches, errors = _watches(store, tmp_path, [stuck, stuck], stuck_s=0.8)
    for watch in watches:
        watch.start()
    wait_for(lambda: len(errors) == 2)
    assert str(errors[0]) == str(errors[1])
    assert "none has got on for" in str(errors[0]) and "ranks 0-1: in step 7, push" in str(errors[0])
    (stacks,) = tmp_path.glob("hang_*.txt")
    text = stacks.read_text()
    assert str(stacks) in str(errors[0]) and "rank 0\nthread MainThread" in text and "rank 1\n" in text
    assert "in wait_for" in text
    for watch in watches:
        watch.stop()


def test_ranks_that_leave_one_after_the_other_are_no_hang(store, tmp_path):
    count = [0]

    def works():
        count[0] += 1
        return Doing(step=count[0], phase="", seconds=0.0)

    watches, errors = _watches(store, tmp_path, [works, works], silence_s=10.0, stuck_s=10.0)
    for watch in watches:
        watch.start()
    wait_for(lambda: count[0] > 8)
    watches[1].stop()
    before = count[0]
    wait_for(lambda: count[0] > before + 10)  # longer than the deadline
    watches[0].stop()
    assert not errors and not list(tmp_path.iterdir())


def test_without_deadlines_there_is_no_thread(store, tmp_path):
    before = threading.active_count()
    watches, _ = _watches(store, tmp_path, [None, None])
    watches[0].start()
    assert threading.active_count() == before
    watches[0].stop()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.thorough)])
@pytest.mark.fault(number=5)
def test_a_stopped_rank_is_named(world, tmp_path, victim, measured, seen):
    deadline_s = 12.0
    run_dir = tmp_path / "run"
    argv = flags(world, run_dir, train_iters=100000, tensor_model_parallel_size=2, save_interval=1,
                 rank_heartbeat_timeout=deadline_s)  # fmt: skip
    launcher = ["--standalone", "--shutdown-timeout", "3"]  # the stopped rank needs SIGKILL
    with start(argv, tmp_path, launcher=launcher) as job:
        wait_for_steps(run_dir / "metrics.jsonl", 2, job, timeout=400)
        rank = sorted(psutil.Process(job.pid).children(), key=lambda process: process.pid)[victim]
        rank.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for(lambda: "Hang: " in job.output, job, timeout=120)
        seen(detect_s=time.monotonic() - stopped)
        measured("a stopped rank: detection, in deadlines", (time.monotonic() - stopped) / deadline_s, 2.0)
        assert job.wait(timeout=120) == 1
    assert job.output.count("Hang: ") == 1 and f"Hang: rank {victim} no longer answers" in job.output, job.output
    assert re.search(rf"rank {victim} \(\S+, pid {rank.pid}\): silent for \d+ s; last in step \d+, \w+", job.output)
    assert re.search(rf"rank {1 - victim}: in step \d+, [\w ]+ for \d+ s, at \S+\.py:\d+, \w+", job.output), job.output
    assert "Run the same command again: it resumes from the last checkpoint" in job.output
    (stacks,) = run_dir.glob("hang_*.txt")
    assert f"rank {1 - victim}\nthread MainThread:" in stacks.read_text()


@pytest.mark.slow
@pytest.mark.fault(number=5)
@pytest.mark.thorough
def test_a_job_whose_ranks_wait_for_ever_ends(world, tmp_path):
    """Rank 1 waits for a signal where it should judge an update; rank 0 waits for it in a collective."""
    argv = flags(world, tmp_path / "run", tensor_model_parallel_size=2, hang_timeout_minutes=0.5)
    env = environment(AT="megatron_tropd.training.guard:Guard.judge", FAULT_RANK="1", DELAYED_RANK="1")
    with start(argv, tmp_path, env, "tests.ending_command") as job:
        assert job.wait(timeout=300) == 1
    assert job.output.count("Hang: all ranks answer, and none has got on for") == 1, job.output
    assert "step 1, train (" in job.output and "ending_command" not in job.output
    (stacks,) = (tmp_path / "run").glob("hang_*.txt")
    assert "in changed" in stacks.read_text(), "the stack of rank 1 shows where it waits"
