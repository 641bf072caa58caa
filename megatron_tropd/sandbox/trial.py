"""Tries whether this machine confines a program, by one that tries what it must not."""

from __future__ import annotations

from megatron_tropd.sandbox.machine import this_machine
from megatron_tropd.sandbox.outcome import SandboxError
from megatron_tropd.sandbox.run import run_python

_PROGRAM = """
import os, socket
def attempt(what, call):
    try:
        call()
    except OSError:
        return
    print(what)
attempt("network: a socket was made", socket.socket)
attempt("files: a file outside was opened", lambda: open(os.path.dirname(os.getcwd()) + "/other", "w"))
attempt("signals: another process could be signalled", lambda: os.kill(os.getppid(), 0))
attempt("processes: one was started", lambda: os.fork() or os._exit(0))
"""


def check() -> list[str]:
    """Return what this machine cannot enforce, a sentence each; empty if it confines programs.

    It asks the kernel, and where nothing is missing runs a program that tries; 30 ms.
    """
    if missing := this_machine().missing:
        return list(missing)
    try:
        outcome = run_python(_PROGRAM)
    except SandboxError as error:
        return [f"The sandbox does not start: {error}"]
    if outcome.verdict != "ok":
        return [f"A program that tries what it must not ended otherwise than expected: {outcome.detail}"]
    return [f"The kernel claims to restrict {line}." for line in outcome.stdout.splitlines()]
