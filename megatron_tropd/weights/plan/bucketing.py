"""Divide a stream of copies into buckets, so that no rank ever stages more than a bucket.  Integers only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

HEADER_BYTES = 64
"""Size of the header of every message (``transport/message.py``)."""


class BucketPacker:
    """First fit: a copy goes to the first bucket, from the pair's last one on, with room for sender and receiver.

    All ranks work through the buckets in the same order.  Copies of different pairs of ranks go into the same
    bucket where there is room, so that pipeline stages and engines do not wait for each other.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._filled: defaultdict[Hashable, list[int]] = defaultdict(list)
        """By rank: bytes in each of its buckets, headers included."""
        self._current: dict[tuple[Hashable, Hashable], int] = {}
        """By pair (sender, receiver): the bucket of its last copy."""

    def _room(self, rank: Hashable, bucket: int) -> int:
        filled = self._filled[rank]
        return self._capacity - (filled[bucket] if bucket < len(filled) else 0)

    def _take(self, rank: Hashable, bucket: int, num_bytes: int) -> None:
        filled = self._filled[rank]
        filled.extend([0] * (bucket + 1 - len(filled)))
        filled[bucket] += num_bytes

    def place(self, sender: Hashable, receiver: Hashable, num_bytes: int) -> int:
        """Place a copy of ``num_bytes`` (at most the capacity less a header) and return its bucket."""
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
