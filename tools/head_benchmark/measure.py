"""The three measurements of a contender: accuracy, then memory, then time."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .contenders import REFERENCES, Contender, three_products
from .inputs import Inputs, Sizes, make_inputs
from .memory import peak_bytes


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender at one configuration."""

    name: str
    loss: str
    error: float | None = None
    """Worst relative error of loss, hidden and weight gradient against float64."""
    peak_bytes: int | None = None
    """Peak memory beyond inputs and returned gradients, at the larger number of tokens."""
    slope: float | None = None
    """Bytes per token and local column, between the two numbers of tokens."""
    milliseconds: float | None = None
    ratio: float | None = None
    """Time divided by that of the three matrix products, both measured in turns."""
    note: str = ""


def forward_backward(contender: Contender, inputs: Inputs) -> torch.Tensor:
    """The loss of one forward and backward pass; the gradients are left in ``inputs``."""
    inputs.clear()
    loss = contender.run(inputs)
    loss.backward()
    return loss.detach()


def accuracy(contender: Contender, sizes: Sizes, device: torch.device) -> float:
    """Worst relative error on few tokens."""
    inputs = make_inputs(sizes, device, seed=1)
    loss = forward_backward(contender, inputs)
    wide = replace(
        inputs,
        hidden=inputs.hidden.detach().double().requires_grad_(),
        weight=inputs.weight.detach().double().requires_grad_(),
    )
    expected = REFERENCES[contender.loss](wide)
    expected.backward()
    ours = [loss, inputs.hidden.grad, inputs.weight.grad]
    theirs = [expected.detach(), wide.hidden.grad, wide.weight.grad]
    return max(_relative(a, b) for a, b in zip(ours, theirs, strict=True))


def _relative(ours: Tensor | None, theirs: Tensor | None) -> float:
    assert ours is not None and theirs is not None, "backward gave no gradient"
    return float((ours.double() - theirs).norm() / theirs.norm())


def memory(contender: Contender, sizes: Sizes, device: torch.device) -> int:
    """Peak bytes beyond inputs and the two gradients that are returned."""
    inputs = make_inputs(sizes, device)
    forward_backward(contender, inputs)  # warm-up: memory that a first call caches is not counted
    inputs.clear()
    gc.collect()
    peak = peak_bytes(lambda: forward_backward(contender, inputs), device)
    return peak - sum(value.numel() * value.element_size() for value in (inputs.hidden, inputs.weight))


def _timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, by events on a GPU; on a CPU those of the process (all threads): wall time includes other processes."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start_s = time.process_time()
    work()
    return time.process_time() - start_s


def times(
    contenders: Sequence[Contender], sizes: Sizes, device: torch.device, repeats: int, warmup: int
) -> tuple[float, dict[str, float | str]]:
    """(median seconds of the three products; for every contender median seconds, or the reason why there are none).

    Contenders run in turns, in reverse order in every other round, so that a change of clock affects all of them.
    """
    inputs = make_inputs(sizes, device)
    products: list[float] = []
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    failed: dict[str, str] = {}
    for turn in range(warmup + repeats):
        order = list(contenders)[:: 1 if turn % 2 else -1]
        seconds = _timed(lambda: three_products(inputs), device)
        if turn >= warmup:
            products.append(seconds)
        for contender in order:
            if contender.name in failed:
                continue
            try:
                seconds = _timed(partial(forward_backward, contender, inputs), device)
            except torch.OutOfMemoryError:
                failed[contender.name] = "out of memory"
                inputs.clear()
                torch.cuda.empty_cache()
                continue
            if turn >= warmup:
                samples[contender.name].append(seconds)
    medians: dict[str, float | str] = {name: statistics.median(values) for name, values in samples.items() if values}
    return statistics.median(products), {**medians, **failed}


def tried(work: Callable[[], float]) -> tuple[float | None, str]:
    """(result, "") or (None, the reason of the failure): foreign code may fail in any way."""
    try:
        return work(), ""
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return None, "out of memory"
    except Exception as error:  # the reason goes into the table
        return None, f"{type(error).__name__}: {error}".splitlines()[0][:120]
