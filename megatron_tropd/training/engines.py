"""The rollout engines of a run, as its settings ask for them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.exchange import broadcast_object, gather_objects
from megatron_tropd.rollout.embedded import EmbeddedEngine
from megatron_tropd.rollout.pool import EnginePool
from megatron_tropd.rollout.sglang.planned_push import PlannedPush, TrainerWeights
from megatron_tropd.rollout.sglang.pool import SGLangPool
from megatron_tropd.training.blueprint import Blueprint
from megatron_tropd.training.engine_settings import is_planned, sglang_settings
from megatron_tropd.training.student import Student, params_dtype
from megatron_tropd.weights.load import local_parameters
from megatron_tropd.weights.side_group import LOOPBACK

Export = Callable[[], Iterable[tuple[str, Tensor]]]
"""The student's current weights by HF name, collectively over the world."""

RolloutEngines = EnginePool | SGLangPool


def make_engines(blueprint: Blueprint, student: Student, export: Export) -> RolloutEngines:
    """Engines without weights; the first push fills them.  Collective over the world."""
    config, source, tokens = blueprint.config, blueprint.models.student, blueprint.tokens
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if settings := sglang_settings(config, source):
        planned = None
        if is_planned(config):
            planned = PlannedPush(
                settings, source.arch, _trainer_weights(config, student, world_size), rank=rank,
                broadcast=broadcast_object, shared=config.engine.update_weight_transport == "planned-shared",
            )  # fmt: skip
        return SGLangPool(
            settings, arch=source.arch, stop_token_ids=tokens.stop_ids, vocab_size=tokens.common_vocab_size,
            rank=rank, broadcast=broadcast_object, export=export, planned=planned,
        )  # fmt: skip
    engine = EmbeddedEngine(
        source.hf_dir,
        stop_token_ids=tokens.stop_ids,
        vocab_size=tokens.common_vocab_size,
        dtype=params_dtype(config),
        device=platform.device(),
        max_batch_size=config.rollout.rollout_max_batch_size,
    )
    return EnginePool(engine, rank=rank, world_size=world_size, gather=gather_objects)


def _trainer_weights(config: TrainConfig, student: Student, world_size: int) -> TrainerWeights:
    """On one machine everybody meets on loopback; on several at torchrun's master address."""
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size
    host = LOOPBACK if alone else os.environ["MASTER_ADDR"]
    return TrainerWeights(
        layout=student.groups.layout,
        params=lambda: local_parameters(student.model),
        gather=gather_objects,
        make_vocab_size_divisible_by=config.model.make_vocab_size_divisible_by,
        store_host=host,
        address=_own_address(host),
    )


def _own_address(peer: str) -> str:
    """The address by which ``peer`` sees this machine.  A host name may resolve to a loopback address; a route
    does not."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing
        return str(probe.getsockname()[0])
