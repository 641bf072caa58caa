"""The engine's process of a planned push: a receiver of the product's, without SGLang.

It is started by ``multiprocessing`` (spawn), so it imports no more than a worker of SGLang's would: not Megatron.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from megatron_tropd.parallel.side_group import Backend, join_store
from megatron_tropd.weights.coordinates.engine_boxes import engine_boxes
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.transport.connect import connect_receiver

from .weights import differing


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """What the receiver needs."""

    spec: str
    digest: str
    port: int
    group: str
    device: str
    backend: Backend
    versions: int
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """What the receiver says at its end."""

    payload_bytes: int
    shared_bytes: int
    """Of the last version, through memory of the trainer's."""
    seconds: tuple[float, ...]
    """By version."""
    differing: tuple[str, ...]
    """Parameters that do not hold the last version, bit for bit."""


def main(invitation: Invitation, pipe: Connection) -> None:
    """Receive every version, compare the last one, and send a :class:`Received`, or the text of an error."""
    try:
        pipe.send(_receive(invitation))
    except Exception:  # of any kind: the trainer's process reports it
        pipe.send(traceback.format_exc())


def _receive(invitation: Invitation) -> Received:
    spec, device = PlanSpec.from_json(invitation.spec), torch.device(invitation.device)
    boxes = engine_boxes(spec.arch, spec.engines[0], 0)
    dtype = getattr(torch, spec.dtype)
    params = {wanted.names[0]: torch.zeros(wanted.shape, dtype=dtype, device=device) for wanted in boxes}
    store = join_store(port=invitation.port, timeout_s=invitation.timeout_s)
    receiver = connect_receiver(
        spec, invitation.digest, engine=0, engine_rank=0, params=params, store=store, group=invitation.group,
        backend=invitation.backend, timeout_s=invitation.timeout_s, shared=True,
    )  # fmt: skip
    reports = [receiver.receive(version) for version in range(1, invitation.versions + 1)]
    wrong = differing(params, boxes, spec.arch, version=invitation.versions)
    return Received(
        payload_bytes=reports[-1].payload_bytes, shared_bytes=reports[-1].shared_bytes,
        seconds=tuple(report.seconds for report in reports), differing=tuple(wrong),
    )  # fmt: skip
