"""Section g: two tensor-parallel ranks on one device, over gloo, give the numbers of one rank.

NCCL takes one rank per GPU; gloo carries CUDA tensors through host memory.  So this shows that the tensor-parallel code
runs on CUDA tensors, and nothing about its speed.
"""

from __future__ import annotations

import math
import multiprocessing
import socket
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes

from .rank_worker import CASES, Numbers, main
from .report import Report
from .setting import Setting
from .shapes import SHALLOW, TINY

Array = npt.NDArray[np.float64]

LIMIT = 1e-5
"""Relative, in fp32: two ranks add in another order."""
_UNSUPPORTED = ("support", "not implemented", "invalid backend", "no backend")
"""What torch says of a collective that gloo does not have for CUDA tensors."""


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(report: Report, setting: Setting) -> None:
    """Run a job of one rank and one of two at the same time, and compare."""
    context, arch = multiprocessing.get_context("spawn"), TINY if setting.tiny else SHALLOW
    pipes: dict[tuple[int, int], Connection] = {}
    processes = []
    try:
        for world_size in (1, 2):
            port = free_port()
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(target=main, args=(rank, world_size, port, setting.tiny, theirs))
                process.start()
                theirs.close()
                processes.append(process)
                pipes[world_size, rank] = ours
        answers = _answers(pipes, setting.seconds * 0.9)
    finally:
        for process in processes:
            process.kill()
    one = next(iter(answers[1, 0].values()))
    for case in CASES:
        _report(report, arch, case, one, [answers[2, rank].get(case, "no answer") for rank in range(2)])


def _answers(pipes: Mapping[tuple[int, int], Connection], seconds: float) -> dict[tuple[int, int], dict[str, Any]]:
    """Return what every rank said; an error's text where it said nothing."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    end = time.monotonic() + seconds
    while len(found) < len(pipes):
        waiting = {pipe: who for who, pipe in pipes.items() if who not in found}
        ready = wait(list(waiting), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            found.update({who: dict.fromkeys(CASES, f"no answer within {seconds:.0f} s") for who in waiting.values()})
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                found[waiting[pipe]] = pipe.recv()
            except EOFError:
                found[waiting[pipe]] = dict.fromkeys(CASES, "the rank ended without an answer")
    return found


def whole_gradients(arch: Architecture, ranks: Sequence[Numbers]) -> dict[str, Array]:
    """Return the gradient of every Hugging Face tensor, put together from what the ranks hold of it; NaN where none
    holds it."""
    found = {name: np.full(shape, np.nan) for name, shape in hf_shapes(arch).items()}
    for numbers in ranks:
        for piece in numbers.pieces:
            found[piece.name][piece.place] = piece.values
    return found


def _relative(ours: Array, expected: Array) -> float:
    return float(np.linalg.norm(ours - expected) / max(float(np.linalg.norm(expected)), 1e-12))


def _report(report: Report, arch: Architecture, case: str, one: Any, two: Sequence[Any]) -> None:
    what = f"{case} against TP 1, two processes on one device over gloo, fp32"
    errors = [answer for answer in (one, *two) if not isinstance(answer, Numbers)]
    if errors:
        last = " / ".join([line.strip() for line in str(errors[0]).splitlines() if line.strip()][-3:])
        lacks = any(words in last.lower() for words in _UNSUPPORTED)
        report.add(what, "not run" if lacks else "failed", reason=last[-600:])
        return
    apart = float(np.abs(one.teacher_logprobs.astype(np.float64) - two[0].teacher_logprobs).max())
    report.limit(f"{what}: teacher's log-probabilities, nats", apart, 1e-4)
    report.limit(f"{what}: loss, relative", abs(two[0].loss - one.loss) / max(abs(one.loss), 1.0), LIMIT)
    report.limit(f"{what}: gradient norm, relative", abs(two[0].grad_norm - one.grad_norm) / one.grad_norm, LIMIT)
    expected, found = whole_gradients(arch, [one]), whole_gradients(arch, two)
    by_tensor = {name: _relative(found[name], gradient) for name, gradient in expected.items()}
    worst = max(by_tensor, key=lambda name: (math.isnan(by_tensor[name]), by_tensor[name]))
    report.limit(
        f"{what}: gradients of {len(expected)} tensors, the worst, relative", by_tensor[worst], 10 * LIMIT, reason=worst
    )
