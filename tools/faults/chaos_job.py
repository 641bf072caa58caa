"""A job that faults end and that is started again with the same command, and what is seen of it from outside."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from tools.faults.chaos_plan import SIZE, Fault
from tools.faults.faulty_train import VARIABLE

_POLL_S = 0.03
_TAIL = 1 << 16
_LONGEST_S = 600.0
"""Until what is waited for has happened: a start, an evaluation or the detection of a hang."""


class Job(Protocol):
    """A launch of torchrun."""

    pid: int

    @property
    def output(self) -> str:
        """Return what it printed so far."""

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""


Start = Callable[[Path, Mapping[str, str]], Job]
"""Starts the job, whose output is to be in the folder given, with further environment variables."""


class ChaosError(RuntimeError):
    """Something did not happen as a fault of the plan should make it happen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What came of a fault."""

    fault: Fault
    what: str
    step: int
    """In which, or after which, it happened."""
    exit_code: int | None
    """Of torchrun; None: the job went on."""
    end_s: float
    """From the fault to the end of the job."""
    next_s: float
    """From the fault to the end of the next step that a launch finished."""
    made_again: int
    """Finished steps that were made again."""


def last_step(run_dir: Path) -> int:
    """Return the last finished step that ``metrics.jsonl`` holds; 0 for none."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        if line.startswith(b'{"kind": "step"') and line.endswith(b"\n"):
            return int(json.loads(line)["step"])
    return 0


def _heartbeat(run_dir: Path) -> dict[str, Any]:
    try:
        beat: dict[str, Any] = json.loads((run_dir / "heartbeat.json").read_text())
    except FileNotFoundError:
        return {"pid": 0, "step": 0, "phase": ""}
    return beat


def saved_step(run_dir: Path) -> int:
    """Return the step that the tracker of the run's checkpoints names; 0 for none."""
    tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def damage(fault: Fault, run_dir: Path) -> int:
    """Damage the newest checkpoint as the fault says; return the step of the one before it."""
    newest = run_dir / "checkpoints" / f"iter_{saved_step(run_dir):07d}"
    shard = sorted(newest.glob("*.distcp"))[fault.rank]
    content = bytearray(shard.read_bytes())
    if fault.kind == "truncated-file":
        del content[-1000:]
    else:
        content[len(content) // 2] ^= 1 << fault.index % 8
    shard.write_bytes(content)
    steps = [int(folder.name[5:]) for folder in newest.parent.glob("iter_*") if folder.name[5:].isdigit()]
    return max(step for step in steps if step < saved_step(run_dir))


class ChaosJob:
    """Launches of one command, until the run is finished.

    Args:
        start: starts a launch.
        run_dir: of the run.
        scratch: empty folder for the output of the launches.
        say: prints a line.
    """

    def __init__(self, start: Start, run_dir: Path, scratch: Path, say: Callable[[str], None]) -> None:
        self._start, self._run_dir, self._scratch, self._say = start, run_dir, scratch, say
        self._launches = 0
        self._job: Job | None = None

    def run(self, plan: Sequence[Fault]) -> list[Seen]:
        """Make the run, with the faults of ``plan``, to its end.

        Raises:
            ChaosError: a fault did not have the effect that it should have, or the run failed without one.
        """
        seen = []
        try:
            self._launch(plan)
            for fault in plan:
                seen.append(self._seen(fault, plan[fault.index + 1 :]))
                self._say(f"step {seen[-1].step}: {seen[-1].what}")
            self._wait_for(lambda: self._code is not None, ends=True)
            if self._code != 0:
                raise self._error(f"the last launch ended with {self._code}")
        finally:
            if self._job is not None and self._job.poll() is None:
                for process in _family(self._job.pid):  # ranks whose torchrun is gone may go on
                    process.kill()
        return seen

    @property
    def _running(self) -> Job:
        assert self._job is not None
        return self._job

    @property
    def _code(self) -> int | None:
        return self._running.poll()

    def _launch(self, left: Sequence[Fault]) -> None:
        """Start the command.  It gets the faults inside of ranks up to the next one from outside: none comes early."""
        inside = []
        for fault in left:
            if fault.of.where == "outside":
                break
            inside.append(fault.plain())
        self._launches += 1
        folder = self._scratch / f"launch_{self._launches}"
        folder.mkdir()
        chaos = {"folder": str(self._scratch), "faults": inside}
        self._job = self._start(folder, {VARIABLE: json.dumps(chaos)} if inside else {})

    def _seen(self, fault: Fault, later: Sequence[Fault]) -> Seen:
        """Have a fault happen, wait until the job goes on, if need be after a new start, and return what came of it."""
        began_s, phase, processes = self._happen(fault)
        what = fault.of.what.format(rank=fault.rank, phase=phase or "between two phases")
        if fault.of.goes_on:
            self._wait_for(lambda: last_step(self._run_dir) >= fault.step)
            self._check_said(fault)
            next_s = time.time() - began_s
            return Seen(fault=fault, what=what, step=fault.step, exit_code=None, end_s=0.0, next_s=next_s, made_again=0)
        self._wait_for(lambda: self._code is not None, ends=True)
        code, end_s = self._code, time.time() - began_s
        self._check_said(fault)
        if code == 0:
            raise self._error(f"{fault.what}: the job ended as if nothing had been")
        self._wait_for(lambda: not any(map(_is_alive, processes)), ends=True)
        before, pid = last_step(self._run_dir), _heartbeat(self._run_dir)["pid"]
        goes_on_from = damage(fault, self._run_dir) if fault.of.damages else saved_step(self._run_dir)
        self._launch(later)
        self._wait_for(lambda: _heartbeat(self._run_dir)["pid"] != pid and last_step(self._run_dir) > goes_on_from)
        return Seen(
            fault=fault, what=what, step=before, exit_code=code, end_s=end_s, next_s=time.time() - began_s,
            made_again=before - goes_on_from,
        )  # fmt: skip

    def _happen(self, fault: Fault) -> tuple[float, str, list[psutil.Process]]:
        """Cause a fault, or wait until it has happened inside a rank; (when, the phase, the job's processes)."""
        marker = self._scratch / f"caused_{fault.index}"
        if fault.of.where != "outside":
            processes: list[psutil.Process] = []

            def happened() -> bool:
                if len(processes) <= SIZE:  # its ranks are not there yet
                    processes[:] = _family(self._running.pid) or processes
                return marker.exists()

            self._wait_for(happened, ends=True)
            if not marker.exists():
                raise self._error(f"the job ended with {self._code} before {fault.what}")
            return marker.stat().st_mtime, "", processes
        self._wait_for(lambda: self._is_in(fault))
        phase, processes = _heartbeat(self._run_dir)["phase"], _family(self._running.pid)
        began_s = time.time()
        self._act(fault, processes)
        return began_s, phase, processes

    def _is_in(self, fault: Fault) -> bool:
        """Return whether the job is in the fault's phase of its step or of the next; or later, if that was missed."""
        beat = _heartbeat(self._run_dir)
        if beat["step"] >= fault.step and beat["phase"] == fault.phase:
            return True
        return last_step(self._run_dir) > fault.step

    def _act(self, fault: Fault, processes: Sequence[psutil.Process]) -> None:
        ranks = sorted((p for p in processes if p.ppid() == self._running.pid), key=lambda process: process.pid)
        name = fault.kind
        if name == "stop-file":
            (self._run_dir / "stop").touch()
        elif name == "sigterm-job":
            os.kill(self._running.pid, signal.SIGTERM)
        elif name in ("kill-job", "flipped-bit", "truncated-file"):
            for process in processes:
                process.kill()
        else:
            numbers = {
                "kill-rank": signal.SIGKILL, "sigterm-rank": signal.SIGTERM, "sigusr1-rank": signal.SIGUSR1,
                "sigstop-rank": signal.SIGSTOP,
            }  # fmt: skip
            ranks[fault.rank].send_signal(numbers[name])

    def _check_said(self, fault: Fault) -> None:
        if fault.says not in self._running.output:
            raise self._error(f"{fault.what}: the job did not print {fault.says!r}")

    def _wait_for(self, condition: Callable[[], bool], *, ends: bool = False) -> None:
        """Wait until ``condition()`` holds, or with ``ends`` until the job has ended."""
        deadline = time.monotonic() + _LONGEST_S
        while not condition():
            code = self._code
            if condition() or (ends and code is not None):
                return
            if code is not None:
                raise self._error(f"the job ended with {code}, without a fault")
            if time.monotonic() > deadline:
                raise self._error(f"what was waited for did not happen in {_LONGEST_S:.0f} s")
            time.sleep(_POLL_S)

    def _error(self, text: str) -> ChaosError:
        return ChaosError(f"{text}; the end of what it printed:\n{self._running.output[-4000:]}")


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and all below it; [] if it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
