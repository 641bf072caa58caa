"""The partition of the vocabulary over tensor-parallel ranks, and the collectives between these ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """The vocabulary ids of this rank's rows of the output table."""

    vocab_size: int
    """Number of ids that exist: the rows of the HF checkpoint's table."""
    rows_per_rank: int
    group: Any
    """Tensor-parallel process group."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at one time; V / tp logits each."""

    @property
    def start(self) -> int:
        """First id of this rank."""
        return dist.get_rank(self.group) * self.rows_per_rank

    @property
    def num_valid(self) -> int:
        """Rows of this rank that are not padding; may be 0."""
        return max(0, min(self.rows_per_rank, self.vocab_size - self.start))

    @property
    def world_size(self) -> int:
        """Number of ranks that the vocabulary is split over."""
        return dist.get_world_size(self.group)

    def columns(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(local column, owned here) of global ``ids``; an id that another rank owns gets some valid column,
        whose value the caller ignores."""
        local = ids - self.start
        mine = (local >= 0) & (local < self.num_valid)
        return local.clamp(0, max(self.num_valid - 1, 0)), mine

    def sum(self, value: Tensor) -> Tensor:
        """SUM over the group, in place."""
        dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """MAX over the group, in place."""
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value
