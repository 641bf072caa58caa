"""Tensor parallelism in one process: a thread for every shard of the vocabulary, which meet at every reduction.

The head itself is unchanged; only the two reductions of ``VocabShard`` go over a meeting instead of a process group.
The sum is in the order of the shards, in every thread, so that all get equal bits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from megatron_tropd.ops.shard import VocabShard

T = TypeVar("T")
_TIMEOUT_S = 60.0


class Meeting:
    """Where ``size`` threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[Tensor | None] = [None] * size
        self._barrier = threading.Barrier(size, timeout=_TIMEOUT_S)

    def exchange(self, index: int, value: Tensor) -> Tensor:
        """Return the values of all threads [size, ...], in order."""
        self._values[index] = value.clone()
        self._barrier.wait()
        values = [value for value in self._values if value is not None]
        self._barrier.wait()  # nobody writes the next value before all have read this one
        return torch.stack(values)

    def leave(self) -> None:
        """Let the other threads fail instead of waiting for this one."""
        self._barrier.abort()


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadShard(VocabShard):
    """Shard number ``index`` of the vocabulary."""

    index: int
    meeting: Meeting = field(repr=False)

    @property
    def start(self) -> int:
        """First id of this shard."""
        return self.index * self.rows_per_rank

    @property
    def world_size(self) -> int:
        """Number of shards."""
        return self.meeting.size

    def sum(self, value: Tensor) -> Tensor:
        """SUM over the shards, in place."""
        return value.copy_(self.meeting.exchange(self.index, value).sum(0))

    def max(self, value: Tensor) -> Tensor:
        """MAX over the shards, in place."""
        return value.copy_(self.meeting.exchange(self.index, value).amax(0))


def on_shards(
    count: int, vocab_size: int, group: object, chunk_tokens: int, work: Callable[[ThreadShard], T]
) -> list[T]:  # fmt: skip
    """Return ``work(shard)`` of every shard, each in a thread.

    Args:
        count: Number of shards.
        vocab_size: Number of ids.
        group: Process group of one rank, for what the head asks Megatron.
        chunk_tokens: Tokens whose logits exist at one time.
        work: What a rank would do.

    Raises:
        Exception: the first that ``work`` raised, if any did.
    """
    meeting, results, errors = Meeting(count), dict[int, T](), list[BaseException]()

    def run(index: int) -> None:
        shard = ThreadShard(
            vocab_size=vocab_size, rows_per_rank=-(-vocab_size // count), group=group, chunk_tokens=chunk_tokens,
            index=index, meeting=meeting,
        )  # fmt: skip
        try:
            results[index] = work(shard)
        except BaseException as error:  # raised in the caller's thread, below
            errors.append(error)
            meeting.leave()

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
    for error in causes or errors:
        raise error
    return [results[index] for index in range(count)]
