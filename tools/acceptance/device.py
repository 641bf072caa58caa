"""Time and memory of this process's device, and the process group of one rank that most sections need."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.groups import ModelGroups, init_distributed, student_groups
from megatron_tropd.parallel.layout import ParallelLayout

T = TypeVar("T")
GB = 1e9


def one_rank() -> ModelGroups:
    """Join a job of one rank, as the training command does, and return the student's groups."""
    init_distributed()
    return student_groups(ParallelLayout())


def wait() -> None:
    """Wait until the device has done its work."""
    if platform.is_cuda():
        torch.cuda.synchronize()


def clocked(work: Callable[[], T]) -> tuple[T, float]:
    """Return the result and the wall seconds of ``work``, the device's work included."""
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return result, time.perf_counter() - start


def milliseconds(work: Callable[[], Any], *, warmup: int = 3, repeats: int = 10) -> float:
    """Return the median milliseconds of ``work``: by CUDA events, or by the clock on a CPU."""
    samples = []
    for turn in range(warmup + repeats):
        if platform.is_cuda():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            taken = start.elapsed_time(end)
        else:
            taken = clocked(work)[1] * 1e3
        if turn >= warmup:
            samples.append(taken)
    return statistics.median(samples)


def peak_gb(work: Callable[[], T]) -> tuple[T, float | None]:
    """Return the result and the most GB allocated at one time while ``work`` ran, all that was there before included;
    None on a CPU."""
    if not platform.is_cuda():
        return work(), None
    wait()
    torch.cuda.reset_peak_memory_stats()
    result = work()
    wait()
    return result, torch.cuda.max_memory_allocated() / GB


def product_of(size: int, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product."""
    left, right = (torch.randn(size, size, device=platform.device(), dtype=dtype) for _ in range(2))
    return 2 * size**3 / (milliseconds(lambda: left @ right) / 1e3)
