"""Where a rank stands in a tensor x pipeline x data grid.  Pure integers, no process group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoords:
    """Coordinates of one rank: tensor shard, pipeline stage, data replica."""

    tp: int
    pp: int
    dp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Sizes of a grid over the first ``world_size`` ranks, in Megatron's order tp-dp-pp (TP fastest).

    Example:
        >>> ParallelLayout(tp=2, pp=2, dp=1).coords(3)
        RankCoords(tp=1, pp=1, dp=0)
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @classmethod
    def for_world(cls, world_size: int, tp: int, pp: int, *, owner: Literal["", "teacher-"] = "") -> ParallelLayout:
        """The layout that fills ``world_size`` ranks; the rest of them become data parallel.

        Raises:
            ValueError: TP x PP does not divide the world; the message names the flags.
        """
        if tp < 1 or pp < 1:
            raise ValueError(
                f"--{owner}tensor-model-parallel-size {tp} and --{owner}pipeline-model-parallel-size {pp} "
                "must both be at least 1"
            )
        if world_size % (tp * pp):
            raise ValueError(
                f"--{owner}tensor-model-parallel-size {tp} x --{owner}pipeline-model-parallel-size {pp} = {tp * pp} "
                f"does not divide the {world_size} ranks torchrun started; change one of the flags or --nproc-per-node"
            )
        return cls(tp=tp, pp=pp, dp=world_size // (tp * pp))

    @property
    def world_size(self) -> int:
        """Number of ranks in the grid."""
        return self.tp * self.pp * self.dp

    def coords(self, rank: int) -> RankCoords:
        """Coordinates of ``rank``."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a layout of {self.world_size} ranks")
        return RankCoords(tp=rank % self.tp, dp=rank // self.tp % self.dp, pp=rank // (self.tp * self.dp))

    def rank(self, *, tp: int, pp: int, dp: int) -> int:
        """The rank at these coordinates; inverse of :meth:`coords`."""
        return tp + self.tp * (dp + self.dp * pp)

    def stage_layers(self, num_layers: int, pp_rank: int) -> range:
        """Global layer numbers of one pipeline stage (an even split).

        Raises:
            ValueError: the layers do not split evenly.
        """
        if num_layers % self.pp:
            raise ValueError(
                f"{num_layers} layers do not split evenly over --pipeline-model-parallel-size {self.pp}; "
                "choose a size that divides the number of layers"
            )
        per_stage = num_layers // self.pp
        return range(pp_rank * per_stage, (pp_rank + 1) * per_stage)

    def padded_vocab_size(self, vocab_size: int, divisible_by: int) -> int:
        """Rows of the embedding and output tables, padding included.

        The multiple is lcm(divisible_by, tp), not Megatron-LM's divisible_by * tp: for every TP that
        divides ``divisible_by`` the padded size is then the same, and checkpoints reshape freely.
        """
        multiple = math.lcm(divisible_by, self.tp)
        return -(-vocab_size // multiple) * multiple
