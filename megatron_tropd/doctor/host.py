"""The host or container: processors, memory, shared memory, limits of a process, disk."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.doctor.finding import Attempts, Finding, Subject

SUBJECT = Subject(title="Host")
GIB = 1 << 30
_CGROUPS = Path("/sys/fs/cgroup")
_FEW_FILES = _FEW_PROCESSES = 4096
_UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """Facts about the host, as a container or a job of a scheduler sees it; None where they could not be read."""

    cpus: int | None = None
    memory_bytes: int | None = None
    shm_bytes: int | None = None
    """Size of /dev/shm."""
    shm_free_bytes: int | None = None
    open_files: int | None = None
    """Soft limits of a process; ``resource.RLIM_INFINITY`` for none."""
    locked_memory: int | None = None
    processes: int | None = None
    directory: str = "."
    disk_free_bytes: int | None = None
    failed: tuple[Finding, ...] = ()


def probe() -> HostFacts:
    """Read the facts of this machine."""
    attempts = Attempts(SUBJECT)
    shm = attempts.read("/dev/shm", _shared_memory)
    disk = attempts.read("disk", lambda: shutil.disk_usage("."))
    return HostFacts(
        cpus=attempts.read("CPUs", _cpus),
        memory_bytes=attempts.read("memory", _memory),
        shm_bytes=shm[0] if shm else None,
        shm_free_bytes=shm[1] if shm else None,
        open_files=attempts.read("open files", lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        locked_memory=attempts.read("locked memory", lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]),
        processes=attempts.read("processes", _processes),
        directory=attempts.read("directory", os.getcwd) or ".",
        disk_free_bytes=disk.free if disk else None,
        failed=attempts.failed,
    )


def _cpus() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [int(quota) // int(period) for quota, period in map(str.split, _cgroup_limits("cpu.max"))]
    return max(1, min(allowed, *quotas, allowed))


def _memory() -> int:
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(installed, *map(int, _cgroup_limits("memory.max")), installed)


def _shared_memory() -> tuple[int, int]:
    """Return the size of /dev/shm and how much of it is free; nothing where it does not exist."""
    if not os.path.exists("/dev/shm"):
        return 0, 0
    usage = shutil.disk_usage("/dev/shm")
    return usage.total, usage.free


def _processes() -> int:
    limits = [resource.getrlimit(resource.RLIMIT_NPROC)[0], *map(int, _cgroup_limits("pids.max"))]
    return min((limit for limit in limits if limit != _UNLIMITED), default=_UNLIMITED)


def _cgroup_limits(name: str) -> list[str]:
    """Return the values of a limit in this process's control group and in those around it, where one is set."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    groups = [_CGROUPS / own, *(_CGROUPS / own).parents]
    files = [group / name for group in groups if group.is_relative_to(_CGROUPS)]
    values = [file.read_text(encoding="utf-8").strip() for file in files if file.exists()]
    return [value for value in values if not value.startswith("max")]


def judge(facts: HostFacts, *, num_gpus: int, gpu_bytes: int, infiniband: bool) -> Iterator[Finding]:
    """Return what ``facts`` mean for a run on so many GPUs with so much memory together.

    ``infiniband``: whether the host has adapters that are used.
    """
    yield from facts.failed
    if facts.cpus is not None:
        yield _judge_cpus(facts.cpus, num_gpus)
    if facts.memory_bytes is not None:
        yield _judge_memory(facts.memory_bytes, gpu_bytes)
    if facts.shm_bytes is not None and facts.shm_free_bytes is not None:
        yield _judge_shm(facts.shm_bytes, facts.shm_free_bytes, num_gpus)
    yield from _judge_limits(facts, infiniband)
    if facts.disk_free_bytes is not None:
        yield _judge_disk(facts.disk_free_bytes, facts.directory)


def size(num_bytes: int) -> str:
    """``64 MiB``, ``1.5 GiB``."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes >> 20} MiB"


def _judge_cpus(cpus: int, num_gpus: int) -> Finding:
    if cpus < 2 * num_gpus:
        advice = (
            f"Each of {num_gpus} ranks keeps a core busy, and has threads of NCCL and of the backward pass beside it.  "
            "Ask for more cores (docker --cpus, Slurm --cpus-per-task)."
        )
        return SUBJECT.note("CPUs", str(cpus), advice)
    return SUBJECT.ok("CPUs", str(cpus))


def _judge_memory(memory: int, gpu_bytes: int) -> Finding:
    if memory < gpu_bytes:
        advice = (
            f"Less than the {size(gpu_bytes)} of the GPUs.  Rollouts, scores, checkpoints while they are written and a "
            "teacher under --teacher-offload are in host memory."
        )
        return SUBJECT.note("memory", size(memory), advice)
    if memory < 4 * GIB:
        advice = "Every rank imports torch, Megatron and transformers; torchrun --nproc-per-node 1 needs the least."
        return SUBJECT.note("memory", size(memory), advice)
    return SUBJECT.ok("memory", size(memory))


def _judge_shm(total: int, free: int, num_gpus: int) -> Finding:
    found = size(total) + (f", {size(free)} free" if free < total * 0.9 else "")
    larger = "docker --shm-size=16g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if free >= GIB:
        return SUBJECT.ok("/dev/shm", found)
    if num_gpus > 1 and free < GIB // 4:
        advice = f"NCCL keeps buffers between the ranks of a host there, and fails where they do not fit.  {larger}."
        return SUBJECT.problem("/dev/shm", found, advice)
    if num_gpus:
        advice = f"NCCL and SGLang's servers keep buffers there; a job of several GPUs needs more.  {larger}."
        return SUBJECT.note("/dev/shm", found, advice)
    advice = (
        "A push to SGLang's servers on a CPU puts --update-weight-buffer-size bytes there (512 MiB): use "
        f"--update-weight-transport planned-shared or bytes, which do not, or give it more: {larger}."
    )
    return SUBJECT.note("/dev/shm", found, advice)


def _limit(value: int) -> str:
    return "unlimited" if value == _UNLIMITED else str(value)


def _judge_limits(facts: HostFacts, infiniband: bool) -> Iterator[Finding]:
    if facts.open_files is not None:
        if _below(facts.open_files, _FEW_FILES):
            advice = (
                "Ranks and servers open sockets, shards and logs by the hundred, and fail with 'Too many open files'.  "
                "ulimit -n 65536; docker --ulimit nofile=65536"
            )
            yield SUBJECT.note("open files", _limit(facts.open_files), advice)
        else:
            yield SUBJECT.ok("open files", _limit(facts.open_files))
    if facts.processes is not None:
        if _below(facts.processes, _FEW_PROCESSES):
            advice = (
                "Threads count too, and every rank and server has dozens; they fail with 'Resource temporarily "
                "unavailable'.  ulimit -u unlimited; docker --pids-limit -1"
            )
            yield SUBJECT.note("processes", _limit(facts.processes), advice)
        else:
            yield SUBJECT.ok("processes", _limit(facts.processes))
    if facts.locked_memory is not None:
        found = "unlimited" if facts.locked_memory == _UNLIMITED else size(facts.locked_memory)
        if infiniband and facts.locked_memory != _UNLIMITED:
            advice = (
                "NCCL locks its buffers for InfiniBand, and fails between nodes with 'Cannot allocate memory'.  "
                "ulimit -l unlimited; docker --ulimit memlock=-1"
            )
            yield SUBJECT.note("locked memory", found, advice)
        else:
            yield SUBJECT.ok("locked memory", found)


def _below(value: int, enough: int) -> bool:
    return value != _UNLIMITED and value < enough


def _judge_disk(free: int, directory: str) -> Finding:
    found = f"{size(free)} free in {directory}"
    if free < 20 * GIB:
        advice = (
            "A checkpoint holds 14 bytes per weight in bf16, 24 GB at 1.7B.  --keep-last deletes old ones, "
            "--save-interval says how often one is made, and --run-dir and --save name another disk."
        )
        return SUBJECT.note("disk", found, advice)
    return SUBJECT.ok("disk", found)
