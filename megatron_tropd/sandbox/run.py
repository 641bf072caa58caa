"""Runs a program in the sandbox."""

from __future__ import annotations

import subprocess
import sys
import time

from megatron_tropd.sandbox.outcome import Limits, Outcome


def check() -> list[str]:
    """Return what this machine cannot enforce, a sentence each; empty if all of it can be."""
    return []


def run_python(
    source: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    python: str = sys.executable,
    allow_weaker: bool = False,
) -> Outcome:
    """Run a program and return how it ended.  This body does not confine it yet."""
    limits = limits or Limits()
    start = time.monotonic()
    try:
        done = subprocess.run(
            [python, "-I", "-c", source], input=stdin, capture_output=True, text=True, timeout=limits.wall_s, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(
            verdict="timeout", exit_code=None, stdout="", stderr="", wall_s=time.monotonic() - start, detail="late"
        )
    return Outcome(
        verdict="ok" if done.returncode == 0 else "error",
        exit_code=done.returncode,
        stdout=done.stdout,
        stderr=done.stderr,
        wall_s=time.monotonic() - start,
        detail=done.stderr.strip().rpartition("\n")[2],
    )
