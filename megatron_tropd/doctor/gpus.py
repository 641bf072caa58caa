"""torch, the GPUs that it sees, and how they are linked."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.doctor import child
from megatron_tropd.doctor.finding import Attempts, Finding, Subject
from megatron_tropd.doctor.versions import OLDEST_TORCH, TORCH

SUBJECT = Subject(title="torch and GPUs")
GIB = 1 << 30
_SMI_DEADLINE_S = 10.0
_SAID = ("torch", "cuda", "hip", "varlen", "nccl_built", "reason", "nccl")
"""Those answers of ``answer.py torch`` that are facts as they are."""
_BUSY_BYTES = 2 * GIB
"""More than the contexts of idle processes; a run that shares a GPU may run out of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, as torch describes it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """Facts about torch and GPUs; None where they could not be read."""

    torch: str = ""
    """Its version; empty where it cannot be imported."""
    end: str = ""
    """What ended the process that asked torch, if it did not succeed."""
    cuda: str | None = None
    """The CUDA version that torch was built with; None for a CPU build."""
    hip: str | None = None
    varlen: bool | None = None
    """Whether torch has ``torch.nn.attention.varlen``."""
    nccl_built: bool | None = None
    reason: str = ""
    """torch's own words on why a CUDA build sees no GPU."""
    gpus: tuple[Gpu, ...] = ()
    arch_list: tuple[str, ...] = ()
    """The architectures that torch has kernels for, such as ``sm_90``."""
    no_peer: tuple[tuple[int, int], ...] = ()
    """Pairs of GPUs of which the first cannot read the memory of the second."""
    nccl: str = ""
    driver: str = ""
    used_bytes: tuple[int, ...] = ()
    """Memory in use on each GPU of the machine, also on those that torch does not see."""
    nvlink: bool | None = None
    driver_loaded: bool | None = None
    device_files: bool | None = None
    hidden: bool | None = None
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs."""
    failed: tuple[Finding, ...] = ()


def probe() -> GpuFacts:
    """Read the facts of this machine."""
    attempts = Attempts(SUBJECT)
    output = child.ask("torch")
    said = output.answers()
    gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in said.get("gpus", ()))
    smi = attempts.read("nvidia-smi", _nvidia_smi) or ("", ())
    return GpuFacts(
        **{name: said[name] for name in _SAID if name in said},
        end=output.end,
        gpus=gpus,
        arch_list=tuple(said.get("arch_list", ())),
        no_peer=tuple((first, second) for first, second in said.get("no_peer", ())),
        driver=smi[0],
        used_bytes=smi[1],
        nvlink=attempts.read("links of GPUs", _has_nvlink) if len(gpus) > 1 else None,
        driver_loaded=attempts.read("driver", Path("/proc/driver/nvidia/version").exists),
        device_files=attempts.read("device files", Path("/dev/nvidiactl").exists),
        hidden=os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"),
        failed=attempts.failed,
    )


def _nvidia_smi() -> tuple[str, tuple[int, ...]]:
    """Return the driver's version and the bytes in use on each GPU; nothing where there is no nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.used", "--format=csv,noheader,nounits"]
    output = child.run(query, deadline_s=_SMI_DEADLINE_S)
    rows = re.findall(r"^([\d.]+), *(\d+|\[.*\])", output.text, re.MULTILINE)
    used = tuple(int(mib) << 20 if mib.isdecimal() else 0 for _, mib in rows)  # in MIG mode: [N/A]
    return (rows[0][0] if rows else "", used)


def _has_nvlink() -> bool | None:
    output = child.run(["nvidia-smi", "topo", "-m"], deadline_s=_SMI_DEADLINE_S)
    return None if output.end else re.search(r"\bNV\d+\b", output.text) is not None


def judge(facts: GpuFacts) -> Iterator[Finding]:
    """Return what ``facts`` mean for a run."""
    yield from facts.failed
    yield _torch(facts)
    if not facts.torch:
        return
    if facts.end:
        advice = "torch was asked for its GPUs and failed, and a run would do the same.  nvidia-smi may say more."
        yield SUBJECT.problem("GPUs", f"torch failed: {facts.end}", advice)
    elif not facts.gpus:
        yield _no_gpu(facts)
    if not facts.gpus:
        return
    yield _gpus(facts.gpus)
    yield _driver(facts)
    yield from _kernels_of_torch(facts)
    yield from _half_precision(facts.gpus)
    yield from _in_use(facts.used_bytes)
    if len(facts.gpus) > 1:
        yield _nccl(facts)
        yield _links(facts)


def _torch(facts: GpuFacts) -> Finding:
    install = f"pip install torch=={TORCH}"
    if not facts.torch:
        found = f"cannot be imported: {facts.end or 'no answer'}"
        return SUBJECT.problem("torch", found, f"Nothing runs without it: {install}")
    build = f"CUDA {facts.cuda}" if facts.cuda else f"ROCm {facts.hip}" if facts.hip else "CPU"
    found = f"{facts.torch}, {build} build"
    if tuple(map(int, re.findall(r"\d+", facts.torch)[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return SUBJECT.problem("torch", found, f"The package needs {oldest} or newer: {install}")
    if facts.hip:
        return SUBJECT.note("torch", found, "Nothing has been run on AMD GPUs.")
    if facts.torch.partition("+")[0] != TORCH:
        return SUBJECT.note("torch", found, f"The tests run with {TORCH}.  If this one fails: {install}")
    return SUBJECT.ok("torch", found)


def _no_gpu(facts: GpuFacts) -> Finding:
    """Without CUDA a run is silently one on the CPU, so GPUs that torch cannot use are a problem."""
    if facts.hidden and facts.device_files:
        advice = "Everything runs on the CPU.  To use the GPUs: unset CUDA_VISIBLE_DEVICES"
        return SUBJECT.note("GPUs", "hidden by CUDA_VISIBLE_DEVICES", advice)
    if facts.device_files and not facts.cuda:
        advice = (
            "The machine has GPUs, and a run would use its CPU.  Install a CUDA build of torch (for Linux, PyPI's is)."
        )
        return SUBJECT.problem("GPUs", "torch is a build without CUDA", advice)
    if facts.device_files:
        advice = (
            "The machine has GPUs, and a run would use its CPU.  Update the driver, or install a torch build for the "
            "CUDA version of this driver (nvidia-smi shows it)."
        )
        return SUBJECT.problem("GPUs", f"torch cannot use them: {facts.reason}", advice)
    if facts.driver_loaded and facts.cuda:
        advice = "A run would use the CPU.  Start the container with its GPUs: docker run --gpus all"
        return SUBJECT.problem("GPUs", "a driver is loaded, but no device is in this container", advice)
    advice = "Everything runs on the CPU over gloo, in the sizes of the quickstart and the tests."
    return SUBJECT.note("GPUs", "none", advice)


def _gpus(gpus: tuple[Gpu, ...]) -> Finding:
    kinds = Counter(
        f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, capability {gpu.capability[0]}.{gpu.capability[1]}"
        for gpu in gpus
    )
    found = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
    if len(kinds) > 1:
        advice = (
            "They differ.  All ranks wait for the slowest and have layers of one size, so the smallest memory counts; "
            "choose equal ones with CUDA_VISIBLE_DEVICES."
        )
        return SUBJECT.note("GPUs", found, advice)
    return SUBJECT.ok("GPUs", found)


def _driver(facts: GpuFacts) -> Finding:
    if not facts.driver:
        return SUBJECT.ok("driver", "works; its version is unknown, because nvidia-smi does not answer")
    return SUBJECT.ok("driver", facts.driver)


def _kernels_of_torch(facts: GpuFacts) -> Iterator[Finding]:
    """A binary runs on its own architecture and on later minor versions of it; PTX runs on everything newer."""
    built = [match.groups() for arch in facts.arch_list if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)\w?", arch))]
    unsupported = sorted(
        gpu.name
        for gpu in set(facts.gpus)
        if not any(
            (int(major), int(minor)) <= gpu.capability and (kind == "compute" or int(major) == gpu.capability[0])
            for kind, major, minor in built
        )
    )
    if built and unsupported:
        advice = "Its kernels would fail with 'no kernel image is available'.  Install another build of torch."
        found = f"this torch has none for {', '.join(unsupported)}, only {' '.join(facts.arch_list)}"
        yield SUBJECT.problem("kernels of torch", found, advice)


def _half_precision(gpus: tuple[Gpu, ...]) -> Iterator[Finding]:
    if old := sorted({gpu.name for gpu in gpus if gpu.capability < (8, 0)}):
        advice = (
            "Leave --bf16 out: they compute bf16 by emulation, slowly, and fp32 needs twice the memory for weights."
        )
        yield SUBJECT.note("bf16", f"not in the hardware of {', '.join(old)}", advice)


def _in_use(used_bytes: tuple[int, ...]) -> Iterator[Finding]:
    busy = {index: used for index, used in enumerate(used_bytes) if used > _BUSY_BYTES}
    if busy:
        listed = ", ".join(f"GPU {index}: {used / GIB:.0f} GiB" for index, used in busy.items())
        advice = "Other processes hold it and a run may not fit beside them.  nvidia-smi names them."
        yield SUBJECT.note("memory in use", listed, advice)


def _nccl(facts: GpuFacts) -> Finding:
    if facts.nccl_built is False:
        advice = (
            "Several GPUs cannot work together without it.  Install a CUDA build of torch with NCCL (PyPI's has it)."
        )
        return SUBJECT.problem("NCCL", "torch was built without it", advice)
    return SUBJECT.ok("NCCL", facts.nccl or "its version is unknown")


def _links(facts: GpuFacts) -> Finding:
    if facts.no_peer:
        first, second = facts.no_peer[0]
        found = f"{len(facts.no_peer)} pairs without peer access, such as {first} and {second}"
        advice = (
            "NCCL goes through host memory between them.  Keep --tensor-model-parallel-size and "
            "--teacher-tensor-model-parallel-size at 1, or inside a group of linked GPUs (nvidia-smi topo -m)."
        )
        return SUBJECT.note("links of GPUs", found, advice)
    if facts.nvlink is False:
        advice = (
            "Peers are reached over PCIe.  --tensor-model-parallel-size above 1 costs more than with NVLink; "
            "--pipeline-model-parallel-size and data parallelism send less."
        )
        return SUBJECT.note("links of GPUs", "peer access, no NVLink", advice)
    return SUBJECT.ok("links of GPUs", "peer access, NVLink" if facts.nvlink else "peer access")
