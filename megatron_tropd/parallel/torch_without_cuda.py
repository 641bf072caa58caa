"""torch.cuda on a machine without CUDA: what Megatron-core asks of it, answered for the CPU.  The only file that
patches torch; ``platform.py`` uses it."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any

import torch

CPU = torch.device("cpu")

REPLACED: dict[str, tuple[str, ...]] = {
    "torch": ("empty", "zeros", "ones", "full", "tensor", "arange", "empty_like", "zeros_like", "ones_like"),
    "torch.Tensor": ("cuda", "to", "type"),
    "torch.cuda": (
        "current_device", "device_count", "synchronize", "empty_cache", "set_device", "Stream", "Event",
        "current_stream", "default_stream", "stream", "get_rng_state", "set_rng_state", "manual_seed",
    ),
    "torch.cuda.random": ("get_rng_state", "set_rng_state"),
}  # fmt: skip


def install() -> None:
    """Replace the names.  Call it once, before the first ``import megatron``."""
    _answer_torch_cuda()
    _redirect_device_literals()


def _is_cuda_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return getattr(value, "type", None) == "cuda"


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda_device(kwargs.get("device")):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _redirect_device_literals() -> None:
    """Make ``device="cuda"``, ``.cuda()`` and ``.to("cuda")`` mean the CPU.

    A TorchFunctionMode would not do: torch runs the backward pass without modes, so activation recomputation
    would use "cuda" again.
    """
    from torch.utils._device import _device_constructors

    # torch.device("meta") finds factories by identity in a cached set: fill the cache with the
    # originals first, or transformers' from_pretrained silently computes garbage buffers.
    _device_constructors()
    for name in REPLACED["torch"]:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda_device(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda_device(kwargs.get("device")):
            kwargs["device"] = CPU
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)  # Megatron asserts "torch.cuda.FloatTensor"
        return answer

    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign,assignment]


class _NullStream:
    """Replaces torch.cuda.Stream and Event; it is a class because annotations say ``Stream | None``."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, *_: Any) -> _NullStream:
        return self

    def query(self) -> bool:
        return True

    def _nothing(self, *_: Any) -> None:
        pass

    wait_stream = synchronize = wait_event = record = wait = _nothing


def _answer_torch_cuda() -> None:
    cuda: Any = torch.cuda
    null = _NullStream()
    cuda.current_device = lambda: CPU
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for name in ("synchronize", "empty_cache", "set_device"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.Stream = cuda.Event = _NullStream
    cuda.current_stream = cuda.default_stream = lambda *_, **__: null
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
