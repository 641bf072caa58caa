"""Staging memory of a rank: two halves, each for the messages of one bucket, made once and used for every update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor

from megatron_tropd.weights.plan.bucketing import HEADER_BYTES
from megatron_tropd.weights.plan.types import STAGING_HALVES, Copy, Message

_BITS = {2: torch.int16, 4: torch.int32}


def by_bucket(messages: Sequence[Message]) -> list[list[Message]]:
    """Return the messages of one rank, grouped by bucket."""
    return [list(group) for _, group in groupby(messages, key=lambda message: message.bucket)]


def half_sizes(buckets: Sequence[Sequence[Message]]) -> list[int]:
    """Return the bytes of each half of the staging memory that the messages of a rank need."""
    sizes = [sum(HEADER_BYTES + message.payload_bytes for message in bucket) for bucket in buckets]
    return [max(sizes[half::STAGING_HALVES], default=0) for half in range(STAGING_HALVES)]


class Staging:
    """Memory for the messages of a rank; those of its n-th bucket lie in half n % 2.

    Args:
        buckets: The messages, grouped by bucket; equal messages have equal places in every process.
        allocate: Returns the memory of a half [uint8], given its size in bytes.
    """

    def __init__(
        self, buckets: Sequence[Sequence[Message]], itemsize: int, allocate: Callable[[int], Tensor]
    ) -> None:  # fmt: skip
        self._itemsize = itemsize
        self._halves = [allocate(size) for size in half_sizes(buckets)]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory held."""
        return sum(half.numel() for half in self._halves)

    def cut(self, number: int, bucket: Sequence[Message]) -> list[Tensor]:
        """Return the memory of each message of this rank's ``number``-th bucket, header included [uint8]."""
        half, start, parts = self._halves[number % STAGING_HALVES], 0, []
        for message in bucket:
            end = start + HEADER_BYTES + message.payload_bytes
            parts.append(half[start:end])
            start = end
        return parts

    def rectangles(self, part: Tensor, message: Message) -> list[Tensor]:
        """Return a view of each copy in a message's memory, in the copy's shape, as integers of the element's size."""
        start, views = HEADER_BYTES, []
        for copy in message.copies:
            end = start + copy.num_bytes
            views.append(part[start:end].view(_BITS[self._itemsize]).view(copy.size))
            start = end
        return views


def as_bits(tensor: Tensor) -> Tensor:
    """Return the same memory as integers, so that copying cannot change a bit pattern (NaN payloads)."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def check_parameters(
    params: Mapping[str, Tensor], wanted: Sequence[tuple[tuple[str, ...], Copy, tuple[int | slice, ...]]], dtype: str
) -> dict[str, Tensor]:
    """Return every parameter that a rank needs, by the first of its names, as integers (:func:`as_bits`).

    Args:
        wanted: (names, copy, rectangle) of every copy of this rank.

    Raises:
        ValueError: a parameter is missing, of another dtype, or too small for its rectangle.
    """
    found: dict[str, Tensor] = {}
    for names, copy, slices in wanted:
        if names[0] not in found:
            present = [name for name in names if name in params]
            if len(present) != 1:
                raise ValueError(f"{copy.hf_name}: the module has {len(present)} of {' / '.join(names)}, one is needed")
            tensor = params[present[0]]
            if str(tensor.dtype) != f"torch.{dtype}":
                raise ValueError(f"{present[0]} is {tensor.dtype}, the plan is for {dtype}")
            found[names[0]] = as_bits(tensor)
        shape = found[names[0]].shape
        ends = [s + 1 if isinstance(s, int) else s.stop for s in slices]
        if len(shape) != len(ends) or any(end > extent for end, extent in zip(ends, shape, strict=True)):
            raise ValueError(f"{names[0]} has shape {list(shape)}; the plan needs at least {ends} ({copy.hf_name})")
    return found
