"""Peak bytes of live tensors: counted operation by operation on a CPU, read from the allocator on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes while it is active, until it is freed.

    Exact for what operations return; scratch inside one operation is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count the storages that are new."""
        before = {value.untyped_storage()._cdata for value in tree_iter((args, kwargs)) if _owns(value)}
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if _owns(value):
                storage = value.untyped_storage()
                if storage._cdata not in before and storage._cdata not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)


def _owns(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "cpu"


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes alive at one time during ``work()``, beyond those alive before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base
    with LiveBytes() as counter:
        work()
    return counter.peak
