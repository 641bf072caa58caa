"""Programs in a child process, with a deadline: a broken driver or package can hang or kill whoever asks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER = Path(__file__).with_name("answer.py")
_DEADLINE_S = 90.0
"""Until torch and Megatron are imported, also for the first time from a slow network file system."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a child has written, and how it ended."""

    text: str = ""
    end: str = ""
    """Empty if it succeeded, otherwise what ended it."""

    def answers(self) -> dict[str, Any]:
        """Return all JSON objects of the text, one a line, as one; lines of other programs are skipped."""
        merged: dict[str, Any] = {}
        for line in self.text.splitlines():
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                merged |= value
        return merged


def run(command: Sequence[str], *, deadline_s: float, environ: Mapping[str, str] | None = None) -> Output:
    """Run ``command`` and return its output, also what it wrote before it failed or was late."""
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
        )
    except OSError as error:
        return Output(end=f"cannot be run: {error.strerror or error}")
    try:
        stdout, stderr = process.communicate(timeout=deadline_s)
    except subprocess.TimeoutExpired as error:
        process.kill()  # and no wait for it: a process that hangs in a driver cannot be killed
        return Output(text=(error.output or b"").decode(errors="replace"), end=f"no answer in {deadline_s:g} s")
    return Output(text=stdout.decode(errors="replace"), end=_end(process.returncode, stderr.decode(errors="replace")))


def _end(status: int, stderr: str) -> str:
    if status == 0:
        return ""
    if status < 0:
        return f"ended by signal {-status} ({signal.strsignal(-status)})"
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Try ", "usage:"))]  # the last lines of a wrong option
    return f"exit code {status}" + "".join(f": {line[:300]}" for line in telling[-1:])


def ask(*words: str) -> Output:
    """Run ``answer.py`` with ``words``, in this interpreter and with the packages that this process would import."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # -P keeps the folder of answer.py off the import path: its sglang.py is not the package sglang.
    return run([sys.executable, "-P", str(ANSWER), *words], deadline_s=_DEADLINE_S, environ=environ)
