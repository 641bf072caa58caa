"""Keeps tensors in pinned host memory between uses, and copies them to the GPU and back on a CUDA stream of its own.

The tensors are laid one after the other, each at a multiple of 256 bytes, into one run of bytes.  On the host the run
is cut into blocks of at most 256 MiB whose sizes are powers of two: torch's allocator of pinned memory rounds a size up
to the next power of two, so that one block of 17 GiB would take 32.  On the GPU the run is one allocation, made anew by
each load, and the tensors are views of it.

A tensor that shares its memory with another one shares it afterwards too.  Without a GPU everything happens in the same
way, in memory that is not pinned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

BLOCK_BYTES = 256 << 20
_SMALLEST_BLOCK = 1 << 20
_ALIGNMENT = 256
"""Bytes; what a kernel may expect of the begin of a tensor."""


def block_sizes(num_bytes: int, largest: int = BLOCK_BYTES) -> list[int]:
    """Return the sizes [bytes] of blocks that hold ``num_bytes``: powers of two, less than 1 MiB more in all."""
    sizes = []
    while num_bytes > 0:
        size = min(largest, 1 << (num_bytes.bit_length() - 1))
        if size < min(_SMALLEST_BLOCK, largest):  # the rest, rounded up
            size = 1 << (num_bytes - 1).bit_length()
        sizes.append(size)
        num_bytes -= size
    return sizes


class HostBlocks:
    """Pinned memory that is kept from one use to the next, because pinning takes long."""

    def __init__(self, *, pin: bool, largest: int = BLOCK_BYTES) -> None:
        self._pin, self._largest = pin, largest
        self._blocks: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of host memory that are held."""
        return sum(len(block) for block in self._blocks)

    def reserve(self, num_bytes: int) -> None:
        """Hold at least ``num_bytes``; what was in the blocks is lost where they were too small."""
        if num_bytes > self.num_bytes:
            self._blocks = []  # first, so that old and new are not held together
            sizes = block_sizes(num_bytes, self._largest)
            self._blocks = [torch.empty(size, dtype=torch.uint8, pin_memory=self._pin) for size in sizes]

    def pieces(self, start: int, end: int) -> Iterator[tuple[Tensor, int, int]]:
        """The parts of the run from byte ``start`` to ``end``: (bytes of a block, first, end), from ``start`` on."""
        begin = 0
        for block in self._blocks:
            low, high = max(start, begin), min(end, begin + len(block))
            if low < high:
                yield block[low - begin : high - begin], low - start, high - start
            begin += len(block)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where tensors that share their memory are in the run of bytes."""

    tensors: list[Tensor]
    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize


class HostOffload:
    """Tensors of one device that are on the host from now on, until they are loaded.

    Making it copies them to the host and frees their memory on the device.  Loading and releasing may be repeated; what
    is changed on the device between the two is lost, so tensors that change are offloaded anew, into the same blocks.
    While they are on the host the tensors are empty, so that using one is an error and not a wrong number.

    Args:
        tensors: contiguous, of one device; parameters are the same objects before and after.
        blocks: reused; only one HostOffload may use them at a time.  None: blocks of its own.

    Raises:
        ValueError: a tensor is not contiguous or on another device, or two share a part of their memory only.
    """

    def __init__(self, tensors: Iterable[Tensor], *, blocks: HostBlocks | None = None) -> None:
        unique = list({id(tensor): tensor for tensor in tensors if tensor.numel()}.values())
        self._device = unique[0].device if unique else torch.device("cpu")
        self._places = _lay_out(unique, self._device)
        self._num_bytes = self._places[-1].end if self._places else 0
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._blocks = blocks or HostBlocks(pin=self._stream is not None)
        self._blocks.reserve(self._num_bytes)
        self._flat: Tensor | None = None
        self._loaded: torch.cuda.Event | None = None
        self._state: Literal["host", "loading", "device"] = "device"
        for place in self._places:
            source = place.tensors[0].detach().reshape(-1).view(torch.uint8)
            for piece, first, last in self._blocks.pieces(place.start, place.end):
                piece.copy_(source[first:last], non_blocking=True)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).synchronize()
        self.release()

    @property
    def state(self) -> Literal["host", "loading", "device"]:
        """Where the tensors are."""
        return self._state

    @property
    def device_bytes(self) -> int:
        """Bytes that the tensors take on the device when they are loaded."""
        return self._num_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the host blocks."""
        return self._blocks.num_bytes

    def prefetch(self) -> None:
        """Begin to copy to the device; the copies run beside what the current stream does.  :meth:`wait` must follow.

        Raises:
            RuntimeError: the tensors are not on the host.
        """
        self._require("host", "prefetch")
        if self._stream is None:
            self._copy()
        else:
            # Memory of the side stream's own pool: its first use need not wait for the current stream.
            with torch.cuda.stream(self._stream):
                self._copy()
                self._loaded = self._stream.record_event()
        self._state = "loading"

    def _copy(self) -> None:
        self._flat = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
        for piece, first, last in self._blocks.pieces(0, self._num_bytes):
            self._flat[first:last].copy_(piece, non_blocking=True)

    def wait(self) -> None:
        """Let the current stream wait for the copies, and give the tensors their values; the host does not wait.

        Raises:
            RuntimeError: :meth:`prefetch` was not called.
        """
        self._require("loading", "wait")
        assert self._flat is not None
        if self._loaded is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._loaded)
            self._flat.record_stream(current)  # or the allocator would reuse it while this stream still reads
        for place in self._places:
            view = self._flat[place.start : place.end].view(place.dtype).view(place.shape)
            for tensor in place.tensors:
                tensor.data = view
        self._state = "device"

    def load(self) -> None:
        """Copy to the device now: :meth:`prefetch` and :meth:`wait`."""
        self.prefetch()
        self.wait()

    def release(self) -> None:
        """Free the memory on the device.  Nothing is copied: the host has the values.

        Raises:
            RuntimeError: the tensors are not on the device.
        """
        self._require("device", "release")
        for place in self._places:
            for tensor in place.tensors:
                tensor.data = torch.empty(0, dtype=place.dtype, device=self._device)
        self._flat, self._loaded, self._state = None, None, "host"
        if self._stream is not None:
            torch.cuda.empty_cache()  # for engines of other processes

    def _require(self, state: str, what: str) -> None:
        if self._state != state:
            raise RuntimeError(f"{what}() needs the tensors in state {state!r}; they are in {self._state!r}")


def _lay_out(tensors: list[Tensor], device: torch.device) -> list[_Place]:
    places: list[_Place] = []
    at: dict[tuple[int, torch.Size, torch.dtype], _Place] = {}
    start = 0
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.device != device:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} on {tensor.device} is not contiguous or not on {device}"
            )
        key = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if (same := at.get(key)) is not None:
            same.tensors.append(tensor)
            continue
        at[key] = place = _Place(tensors=[tensor], start=start, shape=tensor.shape, dtype=tensor.dtype)
        places.append(place)
        start = -(-place.end // _ALIGNMENT) * _ALIGNMENT
    ranges = sorted((address, address + shape.numel() * dtype.itemsize) for address, shape, dtype in at)
    if any(end > begin for (_, end), (begin, _) in itertools.pairwise(ranges)):
        raise ValueError("two tensors share a part of their memory, and would no longer do so afterwards")
    return places
