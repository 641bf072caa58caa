"""Every end of a job is printed once on its node, whichever rank has it and however the ranks are delayed.

These jobs are run by the real torchrun and end in tests/ending_job.py; tests/test_train_ends.py has those of the training
command.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from datetime import timedelta

import pytest

from megatron_tropd.parallel import job_end
from megatron_tropd.parallel.job_end import End, JobEnd, Terminated, describe, is_consequence
from megatron_tropd.parallel.print_once import RECORD
from tests.ranks import free_port
from tests.torchrun_jobs import output_from_imports_on, output_of, own_tracebacks, start
from tests.waiting import wait_for

MODULE = "tests.ending_job"


def _ends(text):
    return [line for line in text.splitlines() if "END OF" in line]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_the_cause_is_printed_and_not_what_follows_from_it(tmp_path, rank):
    text = output_from_imports_on(["cause", str(rank)], tmp_path, module=MODULE)
    assert _ends(text) == [f"END OF rank {rank} failed:"], text
    assert text.count("KeyError: 'the cause'") == 1 and own_tracebacks(text) == 1, "once, with its traceback"
    assert "gloo" not in text
    root = text[text.index("Root Cause") :]
    assert f"rank      : {rank}" in root and "KeyError; see the message above" in root
    assert text.endswith("torchrun exited with 1")


@pytest.mark.slow
def test_a_cause_that_all_ranks_have_is_printed_once(tmp_path):
    text = output_of(["alike", "0"], tmp_path, module=MODULE)
    assert len(_ends(text)) == 1 and text.count("ValueError: the cause") == 1, text
    assert own_tracebacks(text) == 1, "a ValueError of somebody else's code may be anything, so it has its traceback"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_killed_is_reported_by_another(tmp_path, rank):
    text = output_from_imports_on(["killed", str(rank)], tmp_path, module=MODULE)
    (line,) = _ends(text)
    assert line.startswith(f"END OF rank {1 - rank}"), text
    assert "communication with the other ranks failed" in line or "ended by SIGTERM" in line
    assert own_tracebacks(text) == 0 and "Signal 9 (SIGKILL) received" in text


@pytest.mark.slow
def test_a_cause_that_comes_after_a_consequence_is_printed_too(tmp_path):
    text = output_of(["late cause", "0"], tmp_path, module=MODULE)
    first, second = _ends(text)
    assert first.startswith("END OF rank 0: ended by SIGTERM") and second == "END OF rank 1 failed:", text


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_from_outside(tmp_path, number):
    with start(["signal", "0"], tmp_path, module=MODULE) as job:
        wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == 2, job)
        job.send_signal(number)
        assert job.wait(timeout=300) != 0
    (line,) = _ends(job.output)
    assert f"ended by {number.name}" in line and own_tracebacks(job.output) == 0, job.output


@pytest.mark.slow
def test_a_signal_for_ranks_that_wait_in_a_collective(tmp_path):
    """Their main threads never come back to Python; torchrun kills them after its --shutdown-timeout."""
    launcher = ["--standalone", "--shutdown-timeout", "12"]
    with start(["stuck", "0"], tmp_path, module=MODULE, launcher=launcher) as job:
        wait_for(lambda: len(list(tmp_path.glob("ready_*"))) == 2, job)
        job.terminate()
        assert job.wait(timeout=300) != 0
    (line,) = _ends(job.output)
    assert "ended by SIGTERM" in line, job.output


@pytest.mark.slow
def test_each_of_two_nodes_prints_once(tmp_path):
    """Two launches on this machine stand for two nodes; the second sees only consequences."""
    address = f"--nnodes 2 --master-addr 127.0.0.1 --master-port {free_port()} --node-rank".split()
    with contextlib.ExitStack() as running:
        jobs = []
        for node in ("0", "1"):
            (tmp_path / node).mkdir()
            job = start(["cause", "0"], tmp_path / node, module=MODULE, launcher=[*address, node])
            jobs.append(running.enter_context(job))
        for job in jobs:
            assert job.wait(timeout=400) != 0
    texts = [job.output for job in jobs]
    assert _ends(texts[0]) == ["END OF rank 0 failed:"] and texts[0].count("KeyError: 'the cause'") == 1, texts[0]
    (line,) = _ends(texts[1])
    assert "communication with the other ranks failed" in line or "ended by SIGTERM" in line, texts[1]
    assert own_tracebacks(texts[1]) == 0


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.setenv("RANK", "3")


def _end_of(error):
    return End(text=describe(error), exit_code=5, summary="s")


def test_an_error_of_the_user_has_no_traceback(alone, capsys, tmp_path):
    from megatron_tropd.checkpoints.metadata import CheckpointError

    def refuse():
        raise CheckpointError("it is damaged")

    assert JobEnd(_end_of).run(refuse) == 5
    assert capsys.readouterr().err == "CheckpointError: it is damaged\n"


def test_an_error_with_a_text_says_where_it_was_raised(alone):
    from megatron_tropd.data.prompt_source import PromptSource

    with pytest.raises(ValueError) as caught:
        PromptSource((), 0)  # no prompts
    text = describe(caught.value)
    assert text.startswith("rank 3: ValueError: ") and "Traceback" not in text
    assert text.splitlines()[-1].endswith(", __init__)") and "prompt_source.py:" in text


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer"), True),
        (RuntimeError("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv"), True),
        (Terminated(signal.SIGTERM), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("gloo"), False),
    ],
)
def test_what_is_a_consequence(error, expected):
    assert is_consequence(error) == expected


def test_a_lost_store_is_a_consequence():
    import torch.distributed as dist

    with pytest.raises(dist.DistError) as caught:
        dist.TCPStore("127.0.0.1", free_port(), 2, is_master=False, timeout=timedelta(seconds=0.2))
    assert is_consequence(caught.value)


def test_a_signal_during_the_report_of_an_error_does_not_hide_it(alone, capsys):
    def end_of(error):
        return End(text=f"reported {type(error).__name__}", exit_code=5, summary="s")

    class Late(JobEnd):
        late = True

        def _ignore_signals(self):
            if self.late:
                self.late = False
                os.kill(os.getpid(), signal.SIGTERM)
            super()._ignore_signals()

    assert Late(end_of).run(lambda: 1 // 0) == 5
    assert capsys.readouterr().err == "reported ZeroDivisionError\n"


def test_signals_are_handled_as_before_afterwards(alone, capsys):
    before = [signal.getsignal(number) for number in job_end.SIGNALS]
    threads = threading.active_count()
    assert JobEnd(_end_of).run(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(600) or 0) == 5
    assert [signal.getsignal(number) for number in job_end.SIGNALS] == before
    assert threading.active_count() == threads and signal.set_wakeup_fd(-1) == -1
    assert "ended by SIGTERM" in capsys.readouterr().err


def test_a_forked_worker_that_is_terminated_ends_nothing(alone, capsys):
    def command_with_worker():
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.write(write, b"x")
                time.sleep(600)
            finally:
                os._exit(1)
        os.read(read, 1)
        os.kill(pid, signal.SIGTERM)
        return 0 if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM else 1

    assert JobEnd(_end_of).run(command_with_worker) == 0
    assert capsys.readouterr().err == ""


def test_the_record_is_in_the_directory_of_the_launch(monkeypatch, tmp_path, capsys):
    (tmp_path / "1").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1" / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    JobEnd(_end_of).run(lambda: 1 // 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", RECORD]
    assert "ZeroDivisionError" in capsys.readouterr().err
