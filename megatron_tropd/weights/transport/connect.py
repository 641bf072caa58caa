"""Make the two ends of a planned connection, each in the process that holds its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.parallel.side_group import JOIN_TIMEOUT_S, LOOPBACK, Backend, side_group
from megatron_tropd.weights.coordinates.engine_boxes import engine_boxes
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.coordinates.parameters import match_parameters
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.transport.receiver import PlannedReceiver
from megatron_tropd.weights.transport.sender import PlannedSender


def connect_sender(
    spec: PlanSpec, *, rank: int, params: Mapping[str, Tensor], store: dist.TCPStore, group: str, backend: Backend,
    timeout_s: float, address: str = LOOPBACK, shared: bool = False,
) -> PlannedSender:  # fmt: skip
    """Join ``group`` as trainer rank ``rank``.  Blocks until every trainer and engine rank has joined.

    Args:
        params: The live parameters, by GPTModel name (:func:`local_parameters`).
        shared: Whether payloads for engine ranks that can open this rank's memory stay in it; equal on all ranks.

    Raises:
        WeightMismatch, ValueError: the parameters are not those of the spec.
        ConnectionError, TransportError: not all ranks joined in time.
    """
    match_parameters(params, rank_boxes(spec.arch, spec.layout, rank))
    plan = spec.build()
    joined, frames = _join(store, group, rank, plan.world_size, backend=backend, timeout_s=timeout_s, address=address)
    return PlannedSender(plan, rank, params, joined, timeout_s=timeout_s, frames=frames, shared=shared)


def _join(
    store: dist.TCPStore, group: str, rank: int, world_size: int, *, backend: Backend, timeout_s: float, address: str
) -> tuple[Any, Any | None]:
    """Join and return the group of the payloads and, if that is NCCL, a gloo group for the frames (else None).

    Over NCCL two ranks that both receive before they send would wait for ever, and two ranks on one GPU cannot
    exchange messages at all.
    """

    def join(name: str, backend: Backend) -> Any:
        return side_group(
            store, name=name, rank=rank, world_size=world_size, backend=backend, address=address,
            timeout_s=min(timeout_s, JOIN_TIMEOUT_S),
        )  # fmt: skip

    return join(group, backend), None if backend == "gloo" else join(f"{group}-frames", "gloo")


def connect_receiver(
    spec: PlanSpec, digest: str, *, engine: int, engine_rank: int, params: Mapping[str, Tensor], store: dist.TCPStore,
    group: str, backend: Backend, timeout_s: float, version: int = -1, address: str = LOOPBACK, shared: bool = False,
) -> PlannedReceiver:  # fmt: skip
    """Join ``group`` as a rank of an engine; ``version`` is the last update it holds whole.

    Parameters that have padding are set to zero here as a whole: no update writes padding, and a server started
    without weights has arbitrary values there.  The receiver is then partial until the next whole update.

    Args:
        digest: Digest of the trainer's plan.
        params: The live parameters, by the names of SGLang's modules.
        shared: As in :func:`connect_sender`.

    Raises:
        WeightMismatch, ValueError: the parameters are not those of the spec, or the plan built here has another digest.
        ConnectionError, TransportError: not all ranks joined in time.
    """
    matched = match_parameters(params, engine_boxes(spec.arch, spec.engines[engine], engine_rank))
    plan = spec.build()
    if plan.digest != digest:
        raise ValueError(f"the plan made here has digest {plan.digest}, the trainer's has {digest}")
    me = plan.group_rank(engine, engine_rank)
    joined, frames = _join(store, group, me, plan.world_size, backend=backend, timeout_s=timeout_s, address=address)
    receiver = PlannedReceiver(
        plan,
        engine,
        engine_rank,
        params,
        joined,
        timeout_s=timeout_s,
        version=version,
        frames=frames,
        shared=shared,
    )
    for tensor, wanted in matched:
        if sum(box.numel for box in wanted.boxes) < tensor.numel():
            tensor.data.zero_()
            receiver.partial = True
    return receiver
