"""Triton kernels, where Triton can run them; nothing outside imports ``triton``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

from torch import Tensor


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def use_triton(tensor: Tensor) -> bool:
    """Whether kernels take this tensor: on CUDA where Triton is installed, anywhere under Triton's interpreter."""
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and _installed() and tensor.numel() > 0


@functools.cache
def load() -> ModuleType:
    """The module of kernels; imports ``triton``."""
    return importlib.import_module("megatron_tropd.ops.kernels.triton_rows")
