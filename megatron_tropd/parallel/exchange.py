"""Move values between ranks.  Tensors need no headers, because every rank can compute all sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.parallel import platform


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a tensor to be received."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the message in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def _as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    flat = [tensor.detach().cpu().contiguous().flatten().view(torch.uint8) for tensor in tensors]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def _from_bytes(message: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    out, start = [], 0
    for spec in specs:
        part = message[start : start + spec.num_bytes].clone()  # clone: aligned for its dtype
        out.append(part.view(spec.dtype).view(spec.shape))
        start += spec.num_bytes
    return out


class Link(Protocol):
    """Point-to-point messages in host memory between numbered processes."""

    @property
    def rank(self) -> int:
        """Number of this process."""

    def isend(self, tensor: Tensor, peer: int) -> Any:
        """Begin to send; the result has ``wait``."""

    def irecv(self, tensor: Tensor, peer: int) -> Any:
        """Begin to receive; the result has ``wait``."""


class _World:
    """The default process group, whose CPU back end is gloo."""

    @property
    def rank(self) -> int:
        return dist.get_rank()

    def isend(self, tensor: Tensor, peer: int) -> Any:
        return dist.isend(tensor, dst=peer)

    def irecv(self, tensor: Tensor, peer: int) -> Any:
        return dist.irecv(tensor, src=peer)


WORLD: Link = _World()


def exchange(
    send: Mapping[int, Sequence[Tensor]], receive: Mapping[int, Sequence[TensorSpec]], link: Link = WORLD
) -> dict[int, list[Tensor]]:
    """Send tensors to ranks and receive CPU tensors from ranks, over gloo, one message per pair of ranks.

    Collective over exactly the pairs that appear; both sides must agree on order and sizes.  Ranks are those of
    ``link``.
    """
    rank = link.rank
    arrived: dict[int, list[Tensor]] = {}
    work: list[Any] = []
    messages = {peer: _as_bytes(tensors) for peer, tensors in send.items()}
    buffers = {
        peer: torch.empty(sum(spec.num_bytes for spec in specs), dtype=torch.uint8)
        for peer, specs in receive.items()
        if peer != rank
    }
    for peer, buffer in sorted(buffers.items()):
        if buffer.numel():
            work.append(link.irecv(buffer, peer))
    for peer, message in sorted(messages.items()):
        if peer == rank:
            arrived[rank] = _from_bytes(message, receive[rank])
        elif message.numel():
            work.append(link.isend(message, peer))
    for request in work:
        request.wait()
    for peer, buffer in buffers.items():
        arrived[peer] = _from_bytes(buffer, receive[peer])
    return arrived


def broadcast_tensors(tensors: Sequence[Tensor] | None, specs: Sequence[TensorSpec], *, group: Any) -> list[Tensor]:
    """Broadcast the ``tensors`` of the first rank of ``group``, in one message; return them as CPU tensors.

    The message is sent from the device of the rank: by NCCL between GPUs, by gloo between CPUs.  Other ranks
    pass None.  Collective over ``group``.
    """
    device = platform.device()
    if tensors is not None:
        message = _as_bytes(tensors).to(device)
    else:
        message = torch.empty(sum(spec.num_bytes for spec in specs), dtype=torch.uint8, device=device)
    dist.broadcast(message, group=group, group_src=0)
    return _from_bytes(message.cpu(), specs)


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks, by rank, on every rank (small host objects: rollouts, reports).  Collective."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def failures_elsewhere(here: str) -> str:
    """Return how many ranks but the first one failed, and the first of their messages; nothing if none did.  Each gives
    its own, an empty text for none.  Collective."""
    _, *others = gather_objects(here)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(others, 1) if text]
    return f"on {len(failed)} of {len(others) + 1} ranks; {failed[0]}" if failed else ""


def broadcast_object(value: Any) -> Any:
    """Return rank 0's ``value`` on every rank (small host objects); the other ranks' is ignored.  Collective."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
