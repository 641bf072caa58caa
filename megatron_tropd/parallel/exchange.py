"""Moving values between ranks.  Every rank can work out all sizes: no headers, one message per pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.parallel import platform


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Shape and dtype of a tensor that will arrive."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size on the wire."""
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


def exchange(
    send: Mapping[int, Sequence[Tensor]], receive: Mapping[int, Sequence[TensorSpec]]
) -> dict[int, list[Tensor]]:
    """Send tensors to ranks and receive tensors from ranks, CPU tensors over gloo.

    Collective over exactly the pairs that appear; both sides must agree on order and sizes.
    """
    rank = dist.get_rank()
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
            work.append(dist.irecv(buffer, src=peer))
    for peer, message in sorted(messages.items()):
        if peer == rank:
            arrived[rank] = _from_bytes(message, receive[rank])
        elif message.numel():
            work.append(dist.isend(message, dst=peer))
    for request in work:
        request.wait()
    for peer, buffer in buffers.items():
        arrived[peer] = _from_bytes(buffer, receive[peer])
    return arrived


def broadcast_tensors(tensors: Sequence[Tensor] | None, specs: Sequence[TensorSpec], *, group: Any) -> list[Tensor]:
    """The first rank's ``tensors`` on every rank of ``group``, as CPU tensors, in one message.

    The message travels on this rank's device: by NCCL between GPUs, by gloo between CPUs.  Other ranks
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
    """``value`` of every rank, on every rank (small host objects: rollouts, reports)."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's ``value`` on every rank (small host objects); what other ranks pass is ignored."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
