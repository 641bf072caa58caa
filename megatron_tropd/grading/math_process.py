"""Ask a process of its own whether two answers are mathematically equal.

What a model writes can make a computer-algebra system compute for ever (a tower of powers), fill the memory or
overflow the stack.  A process can be ended whatever it is doing; a signal handler or a thread cannot do that.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

_WORKER = Path(__file__).with_name("math_worker.py")


class GradingError(RuntimeError):
    """The process that compares answers cannot be started or does not do its work."""


class MathProcess:
    """One process, started at the first question and again after a question that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._end: Callable[[], object] = lambda: None

    def equal(self, answer: str, reference: str) -> bool:
        """Return whether the two are equal; False where that takes too much time or memory to find out.

        Raises:
            GradingError: the process cannot be started, or it ended for a reason other than its limits.
        """
        if self._process is None:
            self._process = _start()
            self._end = weakref.finalize(self, _end, self._process)
        process = self._process
        try:
            reply = _ask(process, json.dumps([answer, reference]))
        except BaseException:  # the reply to this question must not become the reply to the next one
            process.kill()
            self.close()
            raise
        if reply:
            return bool(json.loads(reply))
        self.close()
        if process.returncode >= 0:  # below 0 it is the signal that ended the process
            raise GradingError(
                f"the process that compares answers (--grader math) ended with exit code {process.returncode}"
            )
        return False

    def close(self) -> None:
        """End the process, if there is one; the next question starts another."""
        self._process = None
        self._end()


def _ask(process: subprocess.Popen[str], question: str) -> str:
    """Return the line that answers ``question``; "" if the process ended instead."""
    assert process.stdin is not None and process.stdout is not None
    try:
        print(question, file=process.stdin, flush=True)
    except BrokenPipeError:
        return ""
    return process.stdout.readline()


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-P", str(_WORKER)],  # -P: the script's folder must not come first among the imports
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of a sum, and so a verdict, can depend on hashes
    )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        _end(process)
        raise GradingError(
            f"the process that compares answers (--grader math) did not start (exit code {process.returncode}); "
            "what it printed is above"
        )
    return process


def _end(process: subprocess.Popen[str]) -> None:
    """Close the pipes, which ends the process, and wait for it."""
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    process.wait()
