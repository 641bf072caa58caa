"""What causes a fault inside a rank; for ``faulty_train.py`` and for tests."""

from __future__ import annotations

import functools
import importlib
import math
import os
import resource
import signal
from collections.abc import Callable, Container
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Damage = Literal["nan", "large", "flip", "activation"]
TOP_BIT = 1 << 30
"""Of the exponent of an fp32 number: a small number becomes one of 1e30 or more."""


def kill() -> NoReturn:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def fill_disk(largest_bytes: int = 1000) -> None:
    """From now on this process can write no file of more bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, resource.RLIM_INFINITY))


def replace(place: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a function or method, named as ``module:Class.method``, by what ``make`` makes of it."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original = getattr(owner, name)
    setattr(owner, name, functools.wraps(original)(make(original)))


class BadNumbers:
    """Damages what this rank computes in chosen calls of a hook, counted from 0.

    Args:
        kind: ``nan``, ``large`` (1e10 times) or ``flip`` (one bit) of a gradient; ``activation``: NaN in the output of
            a layer.
        calls: the calls that are damaged.
    """

    def __init__(self, kind: Damage, calls: Container[int]) -> None:
        self._kind, self._calls, self._seen = kind, calls, 0

    def into(self, model: Any) -> RemovableHandle:
        """Damage a chunk of a model from now on, until the handle is removed."""
        layer = model.decoder.layers[0]
        if self._kind == "activation":
            return layer.register_forward_hook(self._of_layer)
        return layer.mlp.linear_fc2.weight.register_hook(self._of_gradient)

    def _now(self) -> bool:
        self._seen += 1
        return self._seen - 1 in self._calls

    def _of_gradient(self, gradient: Tensor) -> Tensor | None:
        if not self._now():
            return None
        factors = {"nan": torch.nan, "large": 1e10}
        return gradient * factors[self._kind] if self._kind in factors else _flipped(gradient)

    def _of_layer(self, _layer: Any, _inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled() or not self._now():  # the same layers write and score the rollouts
            return
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.data.copy_(hidden.data * torch.nan)


def _flipped(tensor: Tensor) -> Tensor:
    """Return a copy whose smallest element but zeros has another top exponent bit."""
    damaged = tensor.detach().clone()
    flat = damaged.view(-1)
    place = torch.where(flat == 0, math.inf, flat.abs()).argmin()
    flat.view(torch.int32)[place] ^= TOP_BIT
    return damaged
