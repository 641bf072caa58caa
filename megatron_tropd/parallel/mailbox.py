"""Messages from any process of a job to one that reads them, through the job's store.

Any number of processes and threads may post; one process takes, in the order of posting.  A message may have any size:
the store takes 8 MiB at one time, so it travels in parts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

_PART_BYTES = 4 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message: what it is, small values, and bytes."""

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """As JSON has them."""
    data: bytes = b""

    def encode(self) -> bytes:
        """Return the message as bytes."""
        return json.dumps({"kind": self.kind, "values": self.values}).encode() + b"\n" + self.data

    @classmethod
    def decode(cls, message: bytes) -> Message:
        """Return the message of :meth:`encode`."""
        head, _, data = message.partition(b"\n")
        return cls(**json.loads(head), data=data)


class Mailbox:
    """One end of the mailbox ``name``.

    Args:
        name: the same at all ends.
        connect: makes a connection to the store, which this end alone uses.
    """

    def __init__(self, name: str, connect: Callable[[], dist.Store]) -> None:
        self._name, self._store, self._lock = name, connect(), threading.Lock()
        self._taken = 0

    def post(self, message: Message) -> None:
        """Leave a message; returns when the store has it."""
        content = message.encode()
        parts = range(0, len(content), _PART_BYTES)
        with self._lock:
            number = self._store.add(f"{self._name}/posted", 1) - 1
            for part, start in enumerate(parts):
                self._store.set(self._key(number, part), content[start : start + _PART_BYTES])  # type: ignore[arg-type]
            # Last: the reader looks for it.
            self._store.set(f"{self._name}/{number}", str(len(parts)))

    def take(self, timeout_s: float) -> Message | None:
        """Return the next message; None if there is none within so many seconds."""
        deadline, pause = time.monotonic() + timeout_s, _FIRST_PAUSE_S
        key = f"{self._name}/{self._taken}"
        while not self._look(key):
            if time.monotonic() >= deadline:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        with self._lock:
            keys = [self._key(self._taken, part) for part in range(int(self._store.get(key)))]
            content = b"".join(self._store.get(part) for part in keys)
            for used in (key, *keys):
                self._store.delete_key(used)
        self._taken += 1
        return Message.decode(content)

    def _look(self, key: str) -> bool:
        with self._lock:
            return self._store.check([key])

    def _key(self, number: int, part: int) -> str:
        return f"{self._name}/{number}/{part}"
