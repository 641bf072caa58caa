"""Processes that begin with torch and Megatron imported: each is forked from one server that has imported them.

The imports are most of the time of a short job: 6 of its 8 s on each rank.  Jobs that are about the start of a process
itself are started by ``subprocess`` (tests/torchrun_jobs.py).
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing as mp
import os
import signal
import subprocess
import sys
from multiprocessing import util
from pathlib import Path

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.warm_imports"])


class WarmJob:
    """A torchrun job, with the methods of ``subprocess.Popen`` that tests use; as a context, it is killed at the end.

    Args:
        words: torchrun's arguments, or those of ``program``.
        cwd: its directory; its output is in the file ``log`` there.
        program: module whose ``main(words)`` is run instead of torchrun.
    """

    def __init__(
        self, words: list[str], *, cwd: Path, env: dict[str, str], program: str = "torch.distributed.run"
    ) -> None:
        self._log = cwd / "log"
        self._process = CONTEXT.Process(target=_run, args=(program, words, str(cwd), env))
        self._process.start()
        self.pid: int = self._process.pid

    def __enter__(self) -> WarmJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def output(self) -> str:
        """Standard output and standard error so far."""
        return self._log.read_text()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("torchrun", timeout)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self._process.kill()


def _run(program: str, words: list[str], cwd: str, env: dict[str, str]) -> None:
    """Be the program, with the environment, the directory and the output of a process of its own."""
    os.chdir(cwd)
    file = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    for standard, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(file, standard)
        stream.reconfigure(write_through=True)
    os.environ.clear()
    os.environ.update(env)
    util.register_after_fork(_run, _be_a_program)  # in the ranks
    sys.exit(importlib.import_module(program).main(words))


def _be_a_program(_: object) -> None:
    """multiprocessing leaves out the exit handlers of a forked process; a program's run, and only its own.  Nor has a
    program torchrun's handlers of signals, which would print tracebacks while it ends."""
    atexit._clear()
    util.Finalize(None, atexit._run_exitfuncs, exitpriority=0)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
