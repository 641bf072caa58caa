"""The same bits in every run on a GPU (--deterministic-mode), as far as its libraries can.  Not run on a GPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}
"""What cuBLAS, NCCL and Transformer Engine read before their first use."""


def make_deterministic() -> None:
    """Have every library choose kernels that give the same bits in every run.  Call it before the first use of a GPU.

    Where torch has no such kernel it warns and goes on, but see :func:`deterministic_kernels`.  Variables that are set
    already stay.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing reads memory that it did not write, so none has to be filled.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, if ``wanted``, torch raises where it has no kernel that gives the same bits in every run.

    Only then does it choose the deterministic backward pass of flash attention: told to warn, it warns and takes the
    other.  Sampling in the embedded engine has sums for which it would raise, so not the whole run can be inside.
    """
    if not wanted:
        yield
        return
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
