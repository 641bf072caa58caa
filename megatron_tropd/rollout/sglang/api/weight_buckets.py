"""Weights in the form of SGLang's update endpoints: one flat byte tensor and the place of each tensor in it."""

from __future__ import annotations

import base64
import io
import json
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy, reductions, set_sharing_strategy

_ALIGNMENT = 16
"""Bytes; every dtype may be viewed at its place."""
_SHARE_WITHIN_S = 60.0
_MANAGER_IS_SLOW = "Shared memory manager connection has timed out"
"""torch waits for one second for the process that keeps shared memory; on a busy machine that may be too short."""
_CUDA_DEVICE_ARGUMENT = 6
"""Place of the device index among the arguments of torch's rebuild_cuda_tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Tensors that travel in one message."""

    flat: Tensor  # uint8, on the tensors' device
    entries: tuple[SimpleNamespace, ...]
    """Name, shape, dtype, first and end byte.  SimpleNamespace, because SGLang's unpickler admits it and
    its own class cannot be imported here."""

    @property
    def names(self) -> tuple[str, ...]:
        """HF names, in order."""
        return tuple(entry.name for entry in self.entries)


class BucketBuilder:
    """Gathers tensors until ``limit`` bytes; a tensor larger than that is a bucket of its own.

    At most one bucket's tensors and their flat copy exist at a time.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._tensors: list[tuple[str, Tensor]] = []
        self._bytes = 0

    def add(self, name: str, tensor: Tensor) -> WeightBucket | None:
        """Add a tensor; returns the previous bucket if the tensor did not fit into it."""
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        full = self.close() if self._tensors and self._bytes + size > self._limit else None
        self._tensors.append((name, tensor))
        self._bytes += size
        return full

    def close(self) -> WeightBucket:
        """The tensors gathered so far (at least one), as a bucket."""
        flat = torch.empty(self._bytes, dtype=torch.uint8, device=self._tensors[0][1].device)
        entries, start = [], 0
        for name, tensor in self._tensors:
            end = start + tensor.nbytes
            flat[start:end].copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
            entry = SimpleNamespace(
                name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start
            )
            entries.append(entry)
            start += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._tensors, self._bytes = [], 0
        return WeightBucket(flat=flat, entries=tuple(entries))


class _Handle:
    """Pickles as a CUDA IPC handle that names the GPU by UUID: device numbers differ between processes
    that see different GPUs.  SGLang's rebuild_cuda_tensor understands the UUID."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        uuid = str(torch.cuda.get_device_properties(self._tensor.device).uuid)
        place = _CUDA_DEVICE_ARGUMENT
        return rebuild, (*arguments[:place], uuid, *arguments[place + 1 :])


@contextmanager
def _shared_by_file_name() -> Iterator[None]:
    """torch's other strategy hands over descriptors and wants both sides to be one process tree; a server
    that is none dies of it."""
    before = get_sharing_strategy()
    set_sharing_strategy("file_system")
    try:
        yield
    finally:
        set_sharing_strategy(before)


def shared_message(bucket: WeightBucket) -> bytes:
    """Pickled handle of the bucket's memory, for one process of this host; each needs a message of its own.

    The memory must stay until the receiver has answered.
    """
    metadata = list(bucket.entries)
    if bucket.flat.is_cuda:
        return _pickled({"flattened_tensor": _Handle(bucket.flat), "metadata": metadata})
    message = {"flattened_tensor": bucket.flat, "metadata": metadata}
    give_up = time.monotonic() + _SHARE_WITHIN_S
    with _shared_by_file_name():
        while True:
            try:
                return _pickled(message)
            except RuntimeError as error:
                if _MANAGER_IS_SLOW not in str(error) or time.monotonic() > give_up:
                    raise


def _pickled(message: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(message)
    return buffer.getvalue()


def bytes_message(bucket: WeightBucket) -> bytes:
    """The pickled bucket itself, for a process anywhere."""
    return pickle.dumps({"flattened_tensor": bucket.flat.cpu(), "metadata": list(bucket.entries)})


def update_body(messages: list[bytes], *, weight_version: str | None) -> bytes:
    """JSON of /update_weights_from_tensor.

    Args:
        messages: one per tensor-parallel rank of the server.
        weight_version: on the last bucket of an update only; the cache is flushed with it.
    """
    last = weight_version is not None
    head = json.dumps({"load_format": "flattened_bucket", "flush_cache": last, "weight_version": weight_version})
    texts = b",".join(b'"' + base64.b64encode(message) + b'"' for message in messages)
    return head[:-1].encode() + b',"serialized_named_tensors":[' + texts + b"]}"
