"""Memory that other processes of the machine open by a handle: anonymous on a CPU, CUDA IPC on a GPU (not run).

On a CPU a segment is a Linux memfd.  It has no name in /dev/shm: another process opens it through
/proc/PID/fd of the process that made it, and the kernel frees it with the last process that has it mapped,
however those end.  Nothing has to be cleaned up, and a container's limit on /dev/shm does not apply.  The two
processes need not be related; they must have one user and one PID namespace.

Handles are JSON values, never pickles: a process that reaches the group must not be able to run code here.
"""

from __future__ import annotations

import inspect
import mmap
import os
import uuid
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

Handle = dict[str, Any]
_MEMFD_FIELDS = {"pid": int, "fd": int, "name": str, "num_bytes": int}
_CUDA_BYTES = ("storage_handle", "ref_counter_handle", "event_handle")
_CUDA_NUMBERS = ("storage_size_bytes", "storage_offset_bytes", "ref_counter_offset", "event_sync_required")
_CUDA_FIELDS = {"gpu": str, "num_bytes": int, **dict.fromkeys(_CUDA_BYTES, str), **dict.fromkeys(_CUDA_NUMBERS, int)}


class SharedSegment:
    """Memory of this process [uint8] that other processes may open until it is closed or freed."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._fd, self._name = -1, f"tropd-{uuid.uuid4().hex}"
        self._size = max(num_bytes, 1)  # neither kind of memory may be empty
        if device.type == "cpu":
            self._fd = os.memfd_create(self._name)
            os.ftruncate(self._fd, self._size)
            whole = _mapped(self._fd, self._size)
        else:
            whole = torch.empty(self._size, dtype=torch.uint8, device=device)
        self._whole, self.memory = whole, whole[:num_bytes]

    def handle(self) -> Handle:
        """Return a handle for one process; each needs its own, because CUDA handles are counted."""
        if self._whole.device.type == "cpu":
            return {"pid": os.getpid(), "fd": self._fd, "name": self._name, "num_bytes": self._size}
        rebuild, arguments = reductions.reduce_tensor(self._whole)
        named = inspect.signature(rebuild).bind(*arguments).arguments
        return {
            "gpu": str(torch.cuda.get_device_properties(self._whole.device).uuid),
            "num_bytes": self._size,
            **{name: named[name].hex() for name in _CUDA_BYTES},
            **{name: named[name] for name in _CUDA_NUMBERS},
        }

    def close(self) -> None:
        """Close the memfd, so that no process can open the segment any more; do nothing on a GPU.

        Processes that have the segment open keep it, and :attr:`memory` stays valid.
        """
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _mapped(fd: int, size: int) -> Tensor:
    """Map the file and return its memory, which is unmapped when the tensor is freed."""
    return torch.frombuffer(mmap.mmap(fd, size), dtype=torch.uint8)


def _check_handle(handle: Any) -> None:
    if not isinstance(handle, dict):
        raise ValueError(f"no handle of shared memory, but a {type(handle).__name__}")
    for name, kind in (_CUDA_FIELDS if "gpu" in handle else _MEMFD_FIELDS).items():
        if not isinstance(handle.get(name), kind):
            raise ValueError(f"the handle's {name} is no {kind.__name__}, but a {type(handle.get(name)).__name__}")


def open_segment(handle: Any, num_bytes: int) -> Tensor:
    """Open memory of another process of this machine and return its ``num_bytes`` [uint8].

    Raises:
        OSError: there is no such process here, it is another user's, or its descriptor is not the sender's memory.
        ValueError: it is no handle, another size was expected, or this process does not see the handle's GPU.
    """
    _check_handle(handle)
    if handle["num_bytes"] != max(num_bytes, 1):
        raise ValueError(f"a segment of {handle['num_bytes']} bytes was offered, the plan needs {num_bytes}")
    whole = _open_cuda(handle) if "gpu" in handle else _open_memfd(handle)
    return whole[:num_bytes]


def _open_memfd(handle: Handle) -> Tensor:
    path, size = f"/proc/{handle['pid']}/fd/{handle['fd']}", handle["num_bytes"]
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:  # check the open file: another process, above all on another machine, may have the same pid and descriptor
        found = os.readlink(f"/proc/self/fd/{fd}"), os.fstat(fd).st_size
        if found != (f"/memfd:{handle['name']} (deleted)", size):
            raise FileNotFoundError(f"{path} is {found[0]} of {found[1]} bytes here, not the sender's memory")
        return _mapped(fd, size)
    finally:
        os.close(fd)


def _open_cuda(handle: Handle) -> Tensor:
    """Find the GPU by its UUID: device numbers differ between processes that see different GPUs."""
    uuids = [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]
    if handle["gpu"] not in uuids:
        raise ValueError(f"this process does not see the GPU {handle['gpu']}")
    storage, counter, event = (bytes.fromhex(handle[name]) for name in _CUDA_BYTES)
    size, offset, counter_offset, must_wait = (handle[name] for name in _CUDA_NUMBERS)
    return reductions.rebuild_cuda_tensor(  # SGLang's replacement takes no keywords
        Tensor, torch.Size([handle["num_bytes"]]), (1,), 0, torch.UntypedStorage, torch.uint8,
        uuids.index(handle["gpu"]), storage, size, offset, False, counter, counter_offset, event, must_wait,
    )  # fmt: skip
