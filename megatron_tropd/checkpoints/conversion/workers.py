"""The processes that share a conversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def _shares(items: Sequence[tuple[T, int]], count: int) -> list[list[T]]:
    """Deal ``(item, weight)`` pairs out to ``count`` workers, heaviest first to the least loaded."""
    dealt: list[list[T]] = [[] for _ in range(count)]
    load = [0] * count
    for item, weight in sorted(items, key=lambda pair: -pair[1]):
        worker = load.index(min(load))
        dealt[worker].append(item)
        load[worker] += weight
    return dealt


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """This process among those that share a conversion."""

    rank: int
    count: int

    @classmethod
    def of_job(cls) -> Workers:
        """Return the workers of this job: all processes that torchrun started."""
        return cls(rank=dist.get_rank(), count=dist.get_world_size())

    def mine(self, items: Sequence[tuple[T, int]]) -> list[T]:
        """Return this process's share of ``(item, weight)`` pairs.  All processes compute the same shares."""
        return _shares(items, self.count)[self.rank]


def merge(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the mappings of all processes as one, in name order."""
    return dict(sorted((name, value) for part in parts for name, value in part.items()))
