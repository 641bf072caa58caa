"""A command that can save itself does so on a signal, within its time, unless that would be of no use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_tropd.parallel import job_end
from megatron_tropd.parallel.job_end import End, JobEnd, describe
from megatron_tropd.parallel.stop_request import StopRequest
from tests.torchrun_jobs import start
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parent.parent
FAILED, SAVED = 5, 75


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """Without torchrun, and with signals as in a terminal: what runs in the background may ignore some."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in job_end.SIGNALS}
    for name in ("TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _run(act, grace_s=60.0):
    """Exit code of a command that saves itself where ``act``, called with its request, comes back."""
    end = JobEnd(lambda error: End(text=describe(error), exit_code=FAILED, summary="s"))
    request = StopRequest()

    def command():
        with end.saving_first(request, grace_s):
            act(request)
        return SAVED

    return end.run(command), request


def _send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_asks_and_the_command_goes_on(number, capsys):
    code, request = _run(lambda request: (_send(number), wait_for(lambda: request.why)))
    assert code == SAVED and request.why == number.name
    assert capsys.readouterr().err == f"{number.name}: the run saves, then ends; at most 60 s\n"


def test_copies_of_a_signal_are_one(capsys):
    code, request = _run(lambda request: (_send(signal.SIGTERM), _send(signal.SIGINT), wait_for(lambda: request.why)))
    assert code == SAVED and request.why in ("SIGTERM", "SIGINT")
    assert capsys.readouterr().err.count("the run saves") == 1


@pytest.mark.fault(number=30)
def test_a_second_signal_ends_it(capsys, monkeypatch):
    monkeypatch.setattr(job_end, "_SAME_S", 0.0)
    code, _ = _run(
        lambda request: (_send(signal.SIGTERM), wait_for(lambda: request.why), _send(signal.SIGINT), time.sleep(60))
    )
    assert code == FAILED and "ended by SIGINT, the second signal" in capsys.readouterr().err


def test_sigquit_ends_it_at_once(capsys):
    code, request = _run(lambda _: (_send(signal.SIGQUIT), time.sleep(60)))
    assert code == FAILED and request.why is None
    assert "ended by SIGQUIT, which does not wait for a save" in capsys.readouterr().err


@pytest.mark.fault(number=4)
def test_it_ends_when_its_time_is_over(capsys):
    code, _ = _run(lambda _: (_send(signal.SIGTERM), time.sleep(60)), grace_s=0.3)
    assert code == FAILED
    assert "ended by SIGTERM, and not saved within --grace-period 0.3 s" in capsys.readouterr().err


def test_its_time_also_ends_a_main_thread_that_never_comes_back(capsys, monkeypatch):
    """As one that waits in a collective: the report is printed, and whoever sent the signal kills."""
    monkeypatch.setattr(job_end, "_GRACE_S", 0.1)
    printed = []

    def interrupt():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    def said():
        printed.extend(line for line in capsys.readouterr().err.splitlines() if "not saved within" in line)
        return printed

    def act(_):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # what has Terminated raised in this thread
        try:
            threading.Thread(target=interrupt).start()
            wait_for(said)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])

    _run(act, grace_s=0.2)
    assert len(printed) == 1


def test_afterwards_a_signal_ends_the_command(capsys):
    end = JobEnd(lambda error: End(text=describe(error), exit_code=FAILED, summary="s"))

    def command():
        with end.saving_first(StopRequest(), 60.0):
            pass
        _send(signal.SIGTERM)
        time.sleep(60)
        return 0

    assert end.run(command) == FAILED and "ended by SIGTERM; torchrun" in capsys.readouterr().err


_LAUNCHER = """
import os, subprocess, sys, time
rank = [sys.executable, "-c", sys.argv[1]]
ranks = [subprocess.Popen(rank, stdout=subprocess.PIPE, text=True, stdin=subprocess.PIPE) for _ in range(2)]
other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)  # no rank
first = ranks[0]

def asked():
    first.stdin.write("\\n"); first.stdin.flush()
    return first.stdout.readline().strip()

print(asked())
ranks[1].kill()
while open(f"/proc/{ranks[1].pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z": time.sleep(0.01)
print(asked())
ranks[1].wait()
print(asked())
for process in (first, other): process.kill(); process.wait()
"""
_RANK = """
import sys
from megatron_tropd.parallel.torchrun import has_lost_a_rank
for line in sys.stdin: print(has_lost_a_rank(), flush=True)
"""


def test_a_lost_rank_is_seen_as_a_zombie_and_when_it_is_gone():
    env = {**os.environ, "TORCHELASTIC_RUN_ID": "a", "LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", _LAUNCHER, _RANK]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True", "True"], done


@pytest.mark.slow
@pytest.mark.parametrize("way", ["saving", "saving killed"])
def test_under_torchrun(tmp_path, way):
    """SIGTERM for torchrun asks every rank; SIGTERM because a rank was killed ends the other without waiting."""
    with start([way, "1"], tmp_path, module="tests.ending_job") as job:
        wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == 2, job)
        if way == "saving":
            job.terminate()
        else:
            os.kill(int((tmp_path / "ready_1").read_text()), signal.SIGKILL)
        assert job.wait(timeout=300) != 0
    assert len(list(tmp_path.glob("saved_*"))) == (2 if way == "saving" else 0), job.output
    assert job.output.count("the run saves") == (1 if way == "saving" else 0), job.output
    assert (job.output.count("END OF rank 0: ended by SIGTERM; torchrun") == 1) == (way != "saving"), job.output
