"""Copies between the host and this rank's GPU for which the host does not wait; without a GPU nothing is copied."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from megatron_tropd.parallel import platform


class _Pinnable(Protocol):
    def pin_memory(self) -> Any: ...


_P = TypeVar("_P", bound=_Pinnable)


def pinned(record: _P) -> _P:
    """Return a tensor or a record of tensors in pinned memory, from where copies to the GPU run beside the host;
    without a GPU ``record`` itself."""
    return record.pin_memory() if platform.is_cuda() else record  # type: ignore[no-any-return]


def begin_copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the host that is complete after :func:`synchronize`; a tensor that is there is not copied."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def synchronize() -> None:
    """Wait for this rank's GPU, if there is one."""
    if platform.is_cuda():
        torch.cuda.current_stream().synchronize()
