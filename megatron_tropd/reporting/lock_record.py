"""Who holds a run directory: what a job writes into the lock file, and what can be known from it about that job.  Pure,
but for :meth:`LockRecord.of_this_process` and a look at the processes of this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_SAME_START_S = 1.0
"""Two readings of one process's start time differ by less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockRecord:
    """One job, as it writes itself down.  Equal records are of one job: no two processes of a machine have one start
    and one id."""

    host: str
    """Its name, for people: containers on several machines may share one."""
    boot: str
    """Identity of the running kernel, which all containers of a machine see alike; "" where the system has none."""
    container: str
    """Process namespace: ``pid`` means something only to processes of the same one."""
    pid: int
    started: float
    """When the process started, seconds since 1970 by the machine's clock."""
    taken: float
    """When it took the lock, seconds since 1970."""
    kernel: bool
    """Whether the kernel holds the lock for it; else there is only this record."""
    slurm_job: str
    """"" outside Slurm."""
    slurm_restart: int
    """How often Slurm has started the job again."""

    @classmethod
    def of_this_process(cls, *, kernel: bool = True) -> LockRecord:
        """Return what this process writes."""
        return cls(
            host=socket.gethostname(),
            boot=_boot_id(),
            container=_process_namespace(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            taken=time.time(),
            kernel=kernel,
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restart=_count(os.environ.get("SLURM_RESTART_COUNT", "")),
        )

    @classmethod
    def read(cls, text: str) -> LockRecord | None:
        """Return the record in the text of a lock file; None where there is no whole one: nobody holds the lock, or its
        writer died while writing."""
        try:
            values = json.loads(text)
            record = cls(**values)
        except (ValueError, TypeError, RecursionError):
            return None
        types = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
        good = all(type(getattr(record, f.name)) in types[str(f.type)] for f in dataclasses.fields(cls))
        return record if good else None

    def text(self) -> str:
        """Return the text of a lock file."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    def describe(self) -> str:
        """Return who it is and since when, for a message."""
        job = f" (Slurm job {self.slurm_job})" if self.slurm_job else ""
        taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(min(max(0.0, self.taken), 1e11)))
        return f"process {self.pid} on host {self.host}{job} since {taken}"


def is_same_machine(record: LockRecord, here: LockRecord) -> bool:
    """Whether both processes run (or ran) under one kernel, whatever their host names and containers."""
    return record.boot != "" and record.boot == here.boot


def is_gone(record: LockRecord, here: LockRecord) -> bool:
    """Whether the job of ``record`` is known to have ended; the kernel, if it was asked, holds no lock for it.

    False where that cannot be known from here: its heartbeat must tell.
    """
    if record.slurm_job and record.slurm_job == here.slurm_job and record.slurm_restart < here.slurm_restart:
        return True  # a requeued job keeps its id, and starts only after its previous run has ended
    if not is_same_machine(record, here):
        return False
    if record.kernel and here.kernel:
        return True  # the kernel would hold the lock for it
    return record.container == here.container and not _runs(record)


def _runs(record: LockRecord) -> bool:
    try:
        process = psutil.Process(record.pid)
        # The system reuses process ids; the start time tells apart two processes with one id.
        same = abs(process.create_time() - record.started) <= _SAME_START_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except (psutil.Error, ValueError, OverflowError):
        return True


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def _process_namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
