"""Runs jobs side by side, each in a process of its own that begins with everything imported.

The imports of torch and Megatron are a third of the time of a run, so they are made once: by a server from which the
processes are forked.  A job that fails or dies is reported, and the others go on.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # the models are small: a run needs one core and no GPU
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
"""Of all processes of the study; it must be set before the first of them is started."""
PRELOADED = ["tools.study.warm"]
"""What the server imports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A function to call in another process."""

    name: str
    function: Callable[..., Any]
    """At the top level of a module, with arguments and a result that can be pickled."""
    arguments: tuple[Any, ...]
    log: Path
    """What the job prints goes here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended."""

    job: Job
    value: Any = None
    failed: bool = False
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Running:
    job: Job
    process: ForkServerProcess
    started: float


def run_jobs(jobs: Sequence[Job], workers: int, ended: Callable[[Outcome], None]) -> None:
    """Run the jobs, ``workers`` at a time and in their order, and hand each outcome to ``ended``.

    If ``ended`` raises, or on Ctrl-C, no further job is started, and those that run are waited for.  If this process is
    killed, they end with it: two of one name must never write to one place.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting = list(reversed(jobs))
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                job = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_be_the_job, args=(job, theirs), name=job.name)
                process.start()
                theirs.close()
                running[ours] = _Running(job=job, process=process, started=time.monotonic())
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                ended(_outcome(connection, running.pop(connection)))
    finally:
        for left in running.values():
            left.process.join()


def _outcome(connection: Connection, one: _Running) -> Outcome:
    try:
        value, failed = connection.recv(), False
    except EOFError:  # the process ended without an answer: its function raised, or it was killed
        value, failed = None, True
    connection.close()
    one.process.join()
    return Outcome(job=one.job, value=value, failed=failed, wall_seconds=time.monotonic() - one.started)


def _be_the_job(job: Job, answer: Connection) -> None:
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    os.environ.update(ENVIRONMENT)
    file = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    for standard, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(file, standard)
    try:
        value = job.function(*job.arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    answer.send(value)


def _end_with_the_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
