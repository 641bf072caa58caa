"""Giving gloo's process groups back between the calls of one test rank."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def forget_groups() -> None:
    """Destroy every group but the world.

    Megatron's destroy_model_parallel only forgets its groups: each layout then leaves 50 threads per
    rank behind, and a pool of ranks that builds many models ends with thousands.
    """
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    for group in list(c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
