"""Kernels, gaps between them and waits of the host, from a trace of torch's profiler."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.parallel import platform

GAP_US = 20.0
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
_CALLS = {"cuda_runtime", "cuda_driver"}
_WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuEventSynchronize"}
"""Calls that wait for the GPU.  cudaDeviceSynchronize is left out: the profiler makes it."""
_LONGEST_NAME = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """All launches of one kernel."""

    name: str
    count: int
    microseconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """What a trace says of the GPU and of the host's waits."""

    kernels: tuple[Kernel, ...]
    """By time, the longest first; copies and fills included."""
    busy_us: float
    span_us: float
    """From the first kernel's start to the last one's end."""
    gaps: tuple[float, ...]
    """Microseconds of every gap between kernels above :data:`GAP_US`."""
    waits: tuple[str, ...]
    """Names of the calls that wait for the GPU."""


def read(events: Sequence[Mapping[str, Any]]) -> Trace:
    """Return what the ``traceEvents`` of a trace say; times are in microseconds."""
    whole = [event for event in events if event.get("ph") == "X"]
    work = sorted((event for event in whole if event.get("cat") in _ON_GPU), key=lambda event: float(event["ts"]))
    times: dict[str, tuple[int, float]] = {}
    gaps, until = [], None
    for event in work:
        start, taken, name = float(event["ts"]), float(event["dur"]), str(event["name"])
        count, total = times.get(name, (0, 0.0))
        times[name] = count + 1, total + taken
        if until is not None and start - until > GAP_US:
            gaps.append(start - until)
        until = start + taken if until is None else max(until, start + taken)
    first = float(work[0]["ts"]) if work else 0.0
    kernels = [Kernel(name=name, count=count, microseconds=total) for name, (count, total) in times.items()]
    calls = (str(event["name"]) for event in whole if event.get("cat") in _CALLS)
    return Trace(
        kernels=tuple(sorted(kernels, key=lambda kernel: -kernel.microseconds)),
        busy_us=sum(kernel.microseconds for kernel in kernels),
        span_us=(until or first) - first,
        gaps=tuple(gaps),
        waits=tuple(name for name in calls if name.split("_v")[0] in _WAITS),
    )


def lines(trace: Trace, most: int) -> list[str]:
    """Return the kernels that take the longest, a line each."""
    return [
        f"{kernel.microseconds / 1e3:.3f} ms, {kernel.count} x {kernel.name[:_LONGEST_NAME]}"
        for kernel in trace.kernels[:most]
    ]


def profiled(work: Callable[[], Any], file: Path) -> Trace:
    """Return the trace of ``work``, which has run before; the trace itself is left in ``file`` (.json.gz)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if platform.is_cuda():
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        if platform.is_cuda():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(file))
    with gzip.open(file, "rt", encoding="utf-8") as trace:
        return read(json.load(trace)["traceEvents"])
