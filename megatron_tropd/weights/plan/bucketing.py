"""Cutting a stream of copies into buckets, so that no rank ever stages more than a bucket.  Integers only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

HEADER_BYTES = 64
"""What every message carries besides its payload (``message.py``)."""


class BucketPacker:
    """First fit: a copy goes to the first bucket in which its sender and its receiver have room.

    All ranks work through the buckets in the same order, so one that is busy elsewhere does not hold up
    the others: stages of a pipeline and engines fill each other's gaps.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._filled: defaultdict[Hashable, list[int]] = defaultdict(list)
        """By rank: bytes in each of its buckets, headers included."""
        self._current: dict[tuple[Hashable, Hashable], int] = {}
        """By pair: the bucket of its last copy."""

    def _room(self, rank: Hashable, bucket: int) -> int:
        filled = self._filled[rank]
        return self._capacity - (filled[bucket] if bucket < len(filled) else 0)

    def _take(self, rank: Hashable, bucket: int, num_bytes: int) -> None:
        filled = self._filled[rank]
        filled.extend([0] * (bucket + 1 - len(filled)))
        filled[bucket] += num_bytes

    def place(self, sender: Hashable, receiver: Hashable, num_bytes: int) -> int:
        """The bucket of a copy of ``num_bytes`` (at most the capacity less a header)."""
        pair = (sender, receiver)
        bucket = self._current.get(pair, -1)
        if bucket < 0 or min(self._room(sender, bucket), self._room(receiver, bucket)) < num_bytes:
            num_bytes += HEADER_BYTES  # a new message
            bucket += 1
            while min(self._room(sender, bucket), self._room(receiver, bucket)) < num_bytes:
                bucket += 1
            self._current[pair] = bucket
        self._take(sender, bucket, num_bytes)
        self._take(receiver, bucket, num_bytes)
        return bucket
