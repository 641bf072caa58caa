"""Process groups of the student and of the teacher.

Megatron's ``parallel_state`` is one set of globals and can hold one layout: the student's, because
DDP and the optimizer read it.  Every other model gets a ``ProcessGroupCollection`` of its own.  Only
``parallel/`` reads ``parallel_state``; all other code receives a :class:`ModelGroups`.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d

from megatron_tropd.parallel import platform
from megatron_tropd.parallel.interfaces import choose_loopback
from megatron_tropd.parallel.layout import ParallelLayout, RankCoords
from megatron_tropd.parallel.roles import Job, is_on_one_machine, join_job


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGroups:
    """Layout and process groups of one model, and this rank's coordinates in the layout."""

    layout: ParallelLayout
    coords: RankCoords
    pg_collection: Any
    """megatron.core ``ProcessGroupCollection``."""

    @property
    def world(self) -> dist.ProcessGroup:
        """All ranks of the layout: those of this process's role (roles.py)."""
        return dist.group.WORLD  # type: ignore[return-value]  # None where there is no process group

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.coords.pp == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the LM head."""
        return self.coords.pp == self.layout.pp - 1

    @property
    def reports(self) -> bool:
        """Whether this rank reports the results of its tokens: tensor-parallel rank 0 of the last stage.  The
        tensor-parallel ranks hold equal numbers, so each number is reported once."""
        return self.is_last_stage and self.coords.tp == 0

    @property
    def reports_replica(self) -> bool:
        """Whether this rank reports what all context ranks of its replica hold alike: results of whole sequences."""
        return self.reports and self.coords.cp == 0


DEFAULT_TIMEOUT_S = 600.0


def init_distributed(timeout_s: float = DEFAULT_TIMEOUT_S, job: Job | None = None) -> tuple[int, int]:
    """Join the job that torchrun started, or make a job of one rank.  Returns (rank, world size).

    With a ``job`` of several roles the world is that of this process's role.

    A collective of all ranks fails after ``timeout_s`` seconds, so that a lost rank cannot hang the others.
    Groups made later need a timeout of their own, because torch does not pass this one on to them.

    Raises:
        ValueError: there are more ranks on this machine than GPUs.
    """
    if not dist.is_initialized():
        for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        if is_on_one_machine():
            choose_loopback(os.environ)
        if platform.is_cuda():
            local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if local_rank >= num_gpus:
                raise ValueError(
                    f"local rank {local_rank} has no GPU: torch sees {num_gpus} on this machine; start at most so many "
                    "ranks with --nproc-per-node, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
                )
            torch.cuda.set_device(local_rank)
        timeout = timedelta(seconds=timeout_s)
        if job is not None and len(job.roles) > 1:
            dist.init_process_group(
                platform.backend(), store=dist.PrefixStore(job.role.name, join_job(timeout_s)),
                rank=job.rank - job.role.first, world_size=job.role.size, timeout=timeout,
            )  # fmt: skip
        elif "MASTER_ADDR" in os.environ:
            dist.init_process_group(
                platform.backend(), store=dist.PrefixStore("world", join_job(timeout_s)),
                rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]), timeout=timeout,
            )  # fmt: skip
        else:
            dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return dist.get_rank(), dist.get_world_size()


def release_groups() -> None:
    """Destroy every process group except the world.

    A group, with the threads of gloo's, ends when nothing holds it.  So the caches and globals of Megatron that hold
    groups are emptied, also those that its own destroy_model_parallel forgets, and dead cycles, such as those of models
    and optimizers, are collected.  What the caller still holds stays.
    """
    getattr(RotaryEmbedding.forward, "cache_clear", lambda: None)()
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def shutdown() -> None:
    """Destroy all process groups and leave the job.  Call it when nothing holds a group any more.

    A thread of gloo's that lives on may still release the tensors of the last collective when Python ends.  Those are
    Python objects, Python stops any thread that wants them then, and C++ answers with abort.
    """
    if dist.is_initialized():
        release_groups()
        dist.destroy_process_group()


def student_groups(layout: ParallelLayout, *, seed: int = 1234, timeout_s: float = DEFAULT_TIMEOUT_S) -> ModelGroups:
    """Make ``layout`` Megatron's global layout, after destroying all earlier groups.  Collective over the world."""
    release_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  # Megatron annotates int
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ModelGroups(
        layout=layout,
        coords=layout.coords(dist.get_rank()),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


DENSE_AXES = ("tp", "cp", "dp", "pp")
EXPERT_AXES = ("etp", "ep", "edp", "pp")
"""Names of the coordinates of a rank (:class:`RankCoords`) in the grids of dense layers and of experts."""


def _enumerate(layout: ParallelLayout, varying: str, axes: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Return the rank lists of the groups in which exactly the coordinates named in ``varying`` differ."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world_size):
        coords = layout.coords(rank)
        fixed = tuple(getattr(coords, axis) for axis in axes if axis not in varying.split())
        groups.setdefault(fixed, []).append(rank)
    return tuple(tuple(ranks) for ranks in groups.values())


def _new_groups(rank_lists: tuple[tuple[int, ...], ...], timeout_s: float) -> dist.ProcessGroup:
    """Create every group on every rank (new_group is collective over the world); return this rank's group."""
    mine = None
    for ranks in rank_lists:
        group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            mine = group
    if mine is None:
        raise ValueError(f"rank {dist.get_rank()} is in none of the groups {rank_lists}")
    return mine


def teacher_groups(layout: ParallelLayout, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> ModelGroups:
    """Make the groups of a frozen model on the same ranks, in a layout of its own.  Collective over the world.

    Built without ``parallel_state``; there is no group for tied embeddings, because a frozen model
    has no embedding gradients to add.
    """
    if layout.world_size != dist.get_world_size():
        raise ValueError(f"the teacher's layout has {layout.world_size} ranks, the job has {dist.get_world_size()}")
    made: dict[tuple[tuple[int, ...], ...], dist.ProcessGroup] = {}

    def group(varying: str, axes: tuple[str, ...] = DENSE_AXES) -> dist.ProcessGroup:
        ranks = _enumerate(layout, varying, axes)
        if ranks not in made:  # without experts or context parallelism many groups coincide
            made[ranks] = _new_groups(ranks, timeout_s)
        return made[ranks]

    def experts(varying: str) -> dist.ProcessGroup:
        return group(varying, EXPERT_AXES)

    dp, dp_cp, expt_dp = group("dp"), group("dp cp"), experts("edp")
    collection = ProcessGroupCollection(
        tp=group("tp"), pp=group("pp"), mp=group("tp pp"), embd=None, pos_embd=None, cp=group("cp"),
        tp_cp=group("tp cp"), ep=experts("ep"), expt_tp=experts("etp"), tp_ep=experts("etp ep"),
        tp_ep_pp=experts("etp ep pp"), tp_dp_cp=group("tp dp cp"), dp=dp, dp_cp=dp_cp, expt_dp=expt_dp,
        intra_dp_cp=dp_cp, intra_expt_dp=expt_dp,
    )  # fmt: skip
    return ModelGroups(layout=layout, coords=layout.coords(dist.get_rank()), pg_collection=collection)
