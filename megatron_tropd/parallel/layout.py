"""Parallel layouts: the coordinates of a rank in Megatron's grid.  Pure integers, no process group.

Dense layers and experts are split by two grids over the same ranks (Megatron's order ``tp-cp-ep-dp-pp``):
dense layers by tp-cp-dp-pp, experts by etp-ep-edp-pp, with the leftmost coordinate varying fastest.  Both grids have
the same pipeline stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

DEFAULT_VOCAB_DIVISOR = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCoords:
    """Coordinates of one rank: tensor shard, pipeline stage, data replica, context shard; expert tensor
    shard, expert group, expert data replica."""

    tp: int
    pp: int
    dp: int
    cp: int = 0
    etp: int = 0
    ep: int = 0
    edp: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelLayout:
    """Sizes of a grid over the first ``world_size`` ranks, TP fastest.

    Experts use the tp x cp x dp ranks of a pipeline stage in another way: ``ep`` groups of experts, with ``etp``
    shards per expert (None: as many as ``tp``).  ``vpp`` is the number of model chunks per rank (None: one).
    ``first_layers`` and ``last_layers`` are the layers of the first and of the last pipeline stage, with all their
    chunks (None: as many as a stage in the middle).

    Example:
        >>> ParallelLayout(tp=2, pp=2).coords(3)
        RankCoords(tp=1, pp=1, dp=0, cp=0, etp=1, ep=0, edp=0)

    Raises:
        ValueError: a size is below 1, etp x ep does not divide tp x cp x dp, or ``vpp`` is given with ``pp`` 1.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int | None = None
    first_layers: int | None = None
    last_layers: int | None = None
    make_vocab_size_divisible_by: int = DEFAULT_VOCAB_DIVISOR
    """The vocabulary tables are padded to a multiple of this number of rows, and of ``tp``."""

    def __post_init__(self) -> None:
        sizes = (self.tp, self.pp, self.dp, self.cp, self.ep, self.expert_tp, self.chunks)
        if min(sizes) < 1:
            raise ValueError(f"every size of a layout must be at least 1: {self}")
        if self.make_vocab_size_divisible_by < 1:
            raise ValueError(f"--make-vocab-size-divisible-by {self.make_vocab_size_divisible_by} must be at least 1")
        if self.tp * self.cp * self.dp % (self.expert_tp * self.ep):
            raise ValueError(
                f"--expert-model-parallel-size {self.ep} x --expert-tensor-parallel-size {self.expert_tp} does not "
                f"divide the {self.tp * self.cp * self.dp} ranks of a pipeline stage (tensor {self.tp} x context "
                f"{self.cp} x data {self.dp})"
            )
        if self.vpp is not None and self.pp == 1:
            raise ValueError(
                f"--num-virtual-stages-per-pipeline-rank {self.vpp} needs --pipeline-model-parallel-size above 1"
            )

    @classmethod
    def for_world(
        cls, world_size: int, tp: int, pp: int, *, cp: int = 1, ep: int = 1, etp: int | None = None,
        vpp: int | None = None, first_layers: int | None = None, last_layers: int | None = None,
        make_vocab_size_divisible_by: int = DEFAULT_VOCAB_DIVISOR,
        owner: Literal["", "teacher-"] = "",
    ) -> ParallelLayout:  # fmt: skip
        """Return the layout that fills ``world_size`` ranks; ranks left by tp, pp and cp become data parallel.

        Raises:
            ValueError: the sizes do not fit the world; the message names the flags.
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
        if cp < 1 or world_size % (tp * pp * cp):
            raise ValueError(
                f"--{owner}context-parallel-size {cp} does not divide the {world_size // (tp * pp)} ranks that "
                f"--{owner}tensor-model-parallel-size {tp} x --{owner}pipeline-model-parallel-size {pp} leave"
            )
        return cls(
            tp=tp, pp=pp, dp=world_size // (tp * pp * cp), cp=cp, ep=ep, etp=etp, vpp=vpp,
            first_layers=first_layers, last_layers=last_layers,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        )  # fmt: skip

    @property
    def frozen(self) -> ParallelLayout:
        """The layout of a frozen model that is cut as this one, with one chunk in every stage and with data-parallel
        replicas in place of context ranks."""
        return replace(self, vpp=None, cp=1, dp=self.dp * self.cp)

    @property
    def world_size(self) -> int:
        """Number of ranks in the grid."""
        return self.stage_size * self.pp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.tp * self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def chunks(self) -> int:
        """Model chunks (GPTModels) of a rank."""
        return 1 if self.vpp is None else self.vpp

    @property
    def cut(self) -> dict[str, Any]:
        """Sizes that say how a model is cut: the arguments of ``Architecture.cut_errors`` and ``check_layout``."""
        names = ("tp", "pp", "ep", "etp", "vpp", "first_layers", "last_layers")
        return {name: getattr(self, name) for name in names}

    def coords(self, rank: int) -> RankCoords:
        """Return the coordinates of ``rank``."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is not in a layout of {self.world_size} ranks")
        pp, within = divmod(rank, self.stage_size)
        rest, tp = divmod(within, self.tp)
        dp, cp = divmod(rest, self.cp)
        expert_rest, etp = divmod(within, self.expert_tp)
        edp, ep = divmod(expert_rest, self.ep)
        return RankCoords(tp=tp, pp=pp, dp=dp, cp=cp, etp=etp, ep=ep, edp=edp)

    def rank(self, *, tp: int, pp: int, dp: int, cp: int = 0) -> int:
        """Return the rank at these dense coordinates; inverse of :meth:`coords`."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def stage_layers(self, num_layers: int, pp_rank: int, chunk: int = 0) -> range:
        """Return the global layer numbers of one model chunk of a pipeline stage.

        The layers go through the first chunk of every stage, then through the second of every stage, and so on, as in
        Megatron's interleaved schedule.

        Raises:
            ValueError: the layers do not split this way.
        """
        stages = stage_sizes(num_layers, self.pp, vpp=self.vpp, first=self.first_layers, last=self.last_layers)
        sizes = [layers // self.chunks for layers in stages]
        first = chunk * sum(sizes) + sum(sizes[:pp_rank])
        return range(first, first + sizes[pp_rank])

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the rows of the embedding and output tables, padding included.

        The multiple is lcm(make_vocab_size_divisible_by, tp), not Megatron-LM's product of the two: for every TP that
        divides ``make_vocab_size_divisible_by`` the padded size is then the same, and checkpoints reshape freely.
        """
        multiple = math.lcm(self.make_vocab_size_divisible_by, self.tp)
        return -(-vocab_size // multiple) * multiple


def stage_sizes(
    num_layers: int, pp: int, *, vpp: int | None = None, first: int | None = None, last: int | None = None,
    owner: str = "",
) -> tuple[int, ...]:  # fmt: skip
    """Return the layers of every pipeline stage; arguments are those of :class:`ParallelLayout`.

    Raises:
        ValueError: the layers do not split this way; the message names the flags.
    """
    pipeline = f"--{owner}pipeline-model-parallel-size {pp}"
    ends = {
        f"--{owner}decoder-{end}-pipeline-num-layers {layers}": layers
        for end, layers in (("first", first), ("last", last))
        if layers is not None
    }
    if not ends and num_layers % pp:
        raise ValueError(f"{pipeline} does not divide the model's {num_layers} layers")
    rest, stages = num_layers - sum(ends.values()), pp - len(ends)
    given = " and ".join(ends)
    if ends and pp == 1:
        raise ValueError(f"{given}: needs --{owner}pipeline-model-parallel-size above 1")
    if ends and (min(ends.values()) < 1 or rest < stages or stages < 0 or (rest % stages if stages else rest)):
        raise ValueError(
            f"{given}: {rest} of the model's {num_layers} layers are left, which do not split evenly over the {stages} "
            f"other stages of {pipeline}"
        )
    middle = rest // stages if stages else 0
    sizes = [middle] * pp
    sizes[0] = middle if first is None else first
    sizes[-1] = middle if last is None else last
    for layers in sizes:
        if layers % (vpp or 1):
            virtual = f"--{owner}num-virtual-stages-per-pipeline-rank {vpp}"
            raise ValueError(f"{virtual} does not divide the {layers} layers of a pipeline stage")
    return tuple(sizes)
