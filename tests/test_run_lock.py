"""Who may write into a run directory: real processes that hold the lock, die, stop, and come back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_tropd.reporting.lock import RunDirectoryBusyError, RunLock
from megatron_tropd.reporting.lock_record import LockRecord, is_gone
from megatron_tropd.reporting.run_directory import RunDirectory
from tests.test_reporting_files import create, step_report
from tests.waiting import wait_for

ELSEWHERE = {"host": "elsewhere", "boot": "another kernel"}

HOLD = """
import dataclasses, errno, fcntl, json, sys, threading
from pathlib import Path
from megatron_tropd.reporting import lock
from megatron_tropd.reporting.lock_record import LockRecord

path, options = Path(sys.argv[1]), json.loads(sys.argv[2])
if not options["kernel"]:  # a file system that has no flock
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")
    fcntl.flock = flock
lock._SETTLE_S = options["settle_s"]
write = lock._write
def late_write(*words):
    print("about to write", flush=True)
    sys.stdin.readline()
    write(*words)
if options["waits"]:
    lock._write = late_write
real = LockRecord.of_this_process
LockRecord.of_this_process = classmethod(
    lambda cls, **words: dataclasses.replace(real(**words), **options["identity"])
)
try:
    held = lock.RunLock(path, renew_s=options["renew_s"], stale_s=options["stale_s"])
except lock.RunDirectoryBusyError as error:
    print("busy", error, flush=True)
else:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            held.check()
            print("mine", flush=True)
        except lock.RunDirectoryBusyError as error:
            print("lost", error, flush=True)
    held.release()
"""
"""Takes the lock and holds it until its input ends; answers each line of it."""


@contextlib.contextmanager
def job(path: Path, *, kernel=True, before=(), waits=False, renew_s=30.0, stale_s=300.0, settle_s=0.3, **identity):
    """A process that asks for the lock, with what it said.  ``identity`` replaces what it would say of itself."""
    times = {"renew_s": renew_s, "stale_s": stale_s, "settle_s": settle_s}
    options = json.dumps({**times, "kernel": kernel, "waits": waits, "identity": identity})
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(path), options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    try:
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.kill()
        if process.stdin and not process.stdin.closed:
            process.communicate(timeout=30)


def ask(process) -> str:
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def record_of(path: Path) -> LockRecord:
    record = LockRecord.read(path.read_text())
    assert record is not None
    return record


def stop(process) -> None:
    """Stop the process, and return when all its threads stand still."""
    process.send_signal(signal.SIGSTOP)
    tasks = list(Path(f"/proc/{process.pid}/task").iterdir())
    wait_for(lambda: all((task / "stat").read_text().rpartition(")")[2].split()[0] == "T" for task in tasks))


@pytest.mark.fault(number=28)
def test_second_job_is_refused(tmp_path):
    with create(tmp_path):
        with job(tmp_path / "run.lock") as (_, said):
            assert said.startswith("busy") and f"in use by process {os.getpid()} on host {socket.gethostname()}" in said
            assert "since 20" in said and "give this job its own directory" in said
        with pytest.raises(RunDirectoryBusyError):
            create(tmp_path, resume=True)
    assert (tmp_path / "run.lock").read_text() == ""
    create(tmp_path, resume=True).close()


@pytest.mark.fault(number=28)
def test_a_killed_job_leaves_no_lock(tmp_path, caplog):
    path = tmp_path / "run.lock"
    with job(path) as (process, said):
        assert said == "held" and record_of(path).pid == process.pid
        with pytest.raises(RunDirectoryBusyError):
            RunLock(path)
        process.kill()
        process.wait(timeout=30)
        assert record_of(path).pid == process.pid
        RunLock(path).release()  # silently
    assert not caplog.records and path.read_text() == ""


def test_a_stopped_job_keeps_the_lock(tmp_path):
    path = tmp_path / "run.lock"
    with job(path, renew_s=0.01, stale_s=0.2) as (process, _):
        stop(process)
        os.utime(path, (0, 0))
        with pytest.raises(RunDirectoryBusyError, match=f"process {process.pid}"):
            RunLock(path, stale_s=0.2)
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("flags", ["-ru", "-rpfu"])
def test_containers_of_one_machine_share_its_locks(tmp_path, flags):
    """Two containers may have one host name and one process id, or another host name on the same machine."""
    name = [] if "p" in flags else ["sh", "-c", 'hostname other && exec "$0" "$@"']
    before = [shutil.which("unshare") or "", flags, *name]
    if not before[0] or subprocess.run([*before, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip(f"unshare {flags} is not permitted here")
    path = tmp_path / "run.lock"
    with job(path, before=before) as (_, said):
        assert said == "held"
        assert record_of(path).host == ("other" if name else socket.gethostname())
        assert (record_of(path).container == LockRecord.of_this_process().container) is bool(name)
        with pytest.raises(RunDirectoryBusyError):
            RunLock(path)
    RunLock(path).release()


@pytest.mark.parametrize("identity", [ELSEWHERE, {"boot": "another kernel"}, {"boot": ""}])
@pytest.mark.fault(number=28)
def test_a_fresh_lock_of_another_machine_refuses_and_an_old_one_is_taken_over(tmp_path, caplog, identity):
    """Also of a machine with the same name: flock may not reach it."""
    path = tmp_path / "run.lock"
    with job(path, **identity) as (process, _):
        process.kill()  # as if it ran on: no other machine's kernel knows of it
        process.wait(timeout=30)
        with pytest.raises(RunDirectoryBusyError, match=r"last heard of \d+ s ago.*\d+ s from now its lock is taken"):
            RunLock(path)
        assert record_of(path).pid == process.pid
        os.utime(path, (time.time() - 301, time.time() - 301))
        RunLock(path).release()
    assert re.search(r"was not renewed for 3\d\d s", caplog.text) and f"process {process.pid}" in caplog.text


def test_without_flock_the_record_refuses_while_its_process_lives(tmp_path):
    path = tmp_path / "run.lock"
    with job(path, kernel=False) as (process, said):
        assert said == "held" and not record_of(path).kernel
        with job(path, kernel=False) as (_, second):
            assert second.startswith("busy") and str(process.pid) in second
        assert ask(process) == "mine"
        process.kill()
        process.wait(timeout=30)
        with job(path, kernel=False) as (_, third):
            assert third == "held"


def test_a_job_that_lives_renews_its_lock_and_one_that_comes_back_too_late_ends(tmp_path):
    path, times = tmp_path / "run.lock", {"renew_s": 0.05, "stale_s": 20.0}
    with job(path, kernel=False, **times, **ELSEWHERE) as (first, _):
        os.utime(path, (0, 0))
        wait_for(lambda: path.stat().st_mtime > 0)
        with job(path, kernel=False, **times) as (_, said):
            assert said.startswith("busy") and "on host elsewhere" in said
        stop(first)  # as a machine whose network is gone
        os.utime(path, (0, 0))
        with job(path, kernel=False, **times) as (second, said):
            assert said == "held"
            first.send_signal(signal.SIGCONT)
            lost = ask(first)
            assert lost.startswith("lost") and f"taken over by process {second.pid}" in lost
            first.communicate(timeout=30)
            assert first.returncode == 0 and ask(second) == "mine" and record_of(path).pid == second.pid


def test_two_jobs_that_start_at_once_without_flock_are_not_both_let_in(tmp_path):
    path = tmp_path / "run.lock"
    options = {"kernel": False, "waits": True, "settle_s": 3.0}
    with job(path, **options) as (first, one), job(path, **options) as (second, other):
        assert one == other == "about to write"  # both have seen a free lock
        for process in (first, second):
            process.stdin.write("\n")
            process.stdin.flush()
        said = [process.stdout.readline() for process in (first, second)]
    assert sorted(line.split()[0] for line in said) == ["busy", "held"]


def test_a_run_that_was_taken_over_writes_no_line_more(tmp_path):
    with create(tmp_path) as run:
        run.step(step_report(1))
        other = dataclasses.replace(LockRecord.of_this_process(), **ELSEWHERE)
        (tmp_path / "run.lock").write_text(other.text())
        with pytest.raises(RunDirectoryBusyError, match=r"taken over by .* on host elsewhere"):
            run.step(step_report(2))
        with pytest.raises(RunDirectoryBusyError):
            run.rollouts(2, [])
    assert record_of(tmp_path / "run.lock") == other
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_requeued_slurm_job_takes_its_directory_back(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    before = dataclasses.replace(LockRecord.of_this_process(), **ELSEWHERE)
    assert not is_gone(before, LockRecord.of_this_process()) and "Slurm job 77" in before.describe()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_gone(before, LockRecord.of_this_process())
    assert not is_gone(dataclasses.replace(before, slurm_job="78"), LockRecord.of_this_process())


def test_a_process_id_that_was_given_out_again_is_another_process():
    here = dataclasses.replace(LockRecord.of_this_process(), kernel=False)
    assert not is_gone(here, here)
    assert is_gone(dataclasses.replace(here, started=here.started - 100), here)
    assert not is_gone(dataclasses.replace(here, started=here.started - 100, container="pid:[1]"), here)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"pid": 1}', '{"pid": true, "host": 3}', "[" * 60000])
def test_what_is_no_whole_record_holds_nothing(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    RunLock(tmp_path / "run.lock").release()
    whole = LockRecord.of_this_process()
    assert LockRecord.read(whole.text()) == whole
    for name in dataclasses.asdict(whole):
        for value in (None, [], {}, "x" if name not in ("host", "boot", "container", "slurm_job") else 10**400):
            assert LockRecord.read(json.dumps(dataclasses.asdict(whole) | {name: value})) is None


def test_forked_child_leaves_the_lock_alone(tmp_path):
    run = create(tmp_path)
    child = os.fork()
    if not child:
        run.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert record_of(tmp_path / "run.lock").pid == os.getpid()
    with pytest.raises(RunDirectoryBusyError):
        RunLock(tmp_path / "run.lock")
    run.close()
    assert isinstance(run, RunDirectory) and (tmp_path / "run.lock").read_text() == ""
