"""The machine and device of every rank, determined in its own process, so that a plan can choose senders nearby."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.weights.plan.types import Placement

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where the weights of a rank are.  Equal for two ranks on one GPU, or in the host memory of one machine."""

    machine: str
    """Boot id of the kernel, equal in every container of a machine; the host name where there is no boot id."""
    device: str
    """UUID of a GPU, which does not depend on CUDA_VISIBLE_DEVICES; "cpu" for host memory."""


def location(params: Iterable[Tensor]) -> Location:
    """Return the location of ``params``, which this process holds: that of the first one."""
    device = next((tensor.device for tensor in params), torch.device("cpu"))
    machine = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else socket.gethostname()
    name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
    return Location(machine=machine, device=name)


def number_placements(
    sources: Sequence[Location], engines: Sequence[Sequence[Location]]
) -> tuple[tuple[Placement, ...], tuple[tuple[Placement, ...], ...]]:
    """Return ``source_placements`` and ``engine_placements`` of :func:`build_plan`, numbered in order of appearance."""
    nodes: dict[str, int] = {}
    devices: dict[Location, int] = {}

    def place(at: Location) -> Placement:
        return Placement(node=nodes.setdefault(at.machine, len(nodes)), gpu=devices.setdefault(at, len(devices)))

    return tuple(map(place, sources)), tuple(tuple(map(place, engine)) for engine in engines)


def ranks_on_one_gpu(sources: Sequence[Location], engines: Sequence[Sequence[Location]]) -> str:
    """Return the names of a trainer rank and an engine rank with weights on the same GPU; empty if there are none."""
    for number, engine in enumerate(engines):
        for engine_rank, at in enumerate(engine):
            if at.device != "cpu" and at in sources:
                return f"trainer rank {sources.index(at)} and engine {number} rank {engine_rank}"
    return ""
