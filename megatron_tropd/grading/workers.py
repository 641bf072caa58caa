"""Processes that do what may take for ever, each question with a deadline.

What a model writes can make a computer-algebra system compute for ever (a tower of powers), a regular expression search
for ever, fill the memory or overflow the stack.  A process can be ended whatever it is doing; a signal handler or a
thread cannot do that.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_WORKERS = 8
CPU_SECONDS = 3.0
"""Of one question."""
WALL_SECONDS = 300.0
"""Of one question, a hundred times its CPU time: no verdict, only the end of a process that does nothing any more."""
_ROOT = Path(__file__).resolve().parents[2]
_MODULE = "megatron_tropd.grading.worker"


class GradingError(RuntimeError):
    """A process that grades cannot be started or does not do its work."""


class Worker:
    """One process, started at the first question and again after a question that it did not survive."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None

    def ask(self, task: str, *arguments: Any) -> Any:
        """Return the result of a task of ``worker.py``; None where that takes too much CPU time or memory.

        Raises:
            GradingError: the process cannot be started, the task failed, or the process ended or fell silent for
                another reason than its limits.
        """
        if self._process is None:
            self._process = _start(self._cpu_seconds)
            self._end = weakref.finalize(self, _end, self._process)
        process = self._process
        try:
            line = _exchange(process, json.dumps([task, *arguments]))
        except BaseException:  # the reply to this question must not become the reply to the next one
            process.kill()
            self.close()
            raise
        if line:
            reply = json.loads(line)
            if "error" in reply:
                raise GradingError(f"a process that grades failed at {task}: {reply['error']}")
            return reply["result"]
        self.close()
        if process.returncode >= 0:  # below 0 it is the signal that ended the process
            raise GradingError(f"a process that grades ended with exit code {process.returncode} ({task})")
        return None

    def close(self) -> None:
        """End the process, if there is one; the next question starts another."""
        self._process = None
        self._end()


class Workers:
    """A few workers for one rank.  Threads may ask at one time; each question goes to an idle worker."""

    def __init__(self, size: int, cpu_seconds: float = CPU_SECONDS) -> None:
        self.size = size
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()  # the last one used is started and warm
        for _ in range(size):
            self._idle.put(Worker(cpu_seconds))

    def ask(self, task: str, *arguments: Any) -> Any:
        """Ask an idle worker, or wait for one; see :meth:`Worker.ask`."""
        worker = self._idle.get()
        try:
            return worker.ask(task, *arguments)
        finally:
            self._idle.put(worker)


def share_of_cores() -> int:
    """Return how many workers a rank has: its share of the machine's cores, at least 1 and at most MAX_WORKERS."""
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(max(1, len(os.sched_getaffinity(0)) // ranks), MAX_WORKERS)


def _exchange(process: subprocess.Popen[str], question: str) -> str:
    """Return the line that answers ``question``; "" if the process ended instead.

    Raises:
        GradingError: there is no answer for WALL_SECONDS.
    """
    assert process.stdin is not None and process.stdout is not None
    try:
        print(question, file=process.stdin, flush=True)
    except BrokenPipeError:
        return ""
    answered = select.poll()
    answered.register(process.stdout, select.POLLIN)
    if not answered.poll(WALL_SECONDS * 1000):
        raise GradingError(f"a process that grades gave no answer for {WALL_SECONDS:.0f} seconds")
    return process.stdout.readline()


def _start(cpu_seconds: float) -> subprocess.Popen[str]:
    path = os.pathsep.join(part for part in (str(_ROOT), os.environ.get("PYTHONPATH", "")) if part)
    process = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            _MODULE,
            str(cpu_seconds),
        ],  # -P: the current directory must not come first among the imports
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # The order of a sum, and so a verdict, can depend on hashes.
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _end(process)
        raise GradingError(
            f"a process that grades did not start (exit code {process.returncode}); what it printed is above"
        )
    return process


def _end(process: subprocess.Popen[str]) -> None:
    """Close the pipes, which ends the process, and wait for it."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    process.wait()
