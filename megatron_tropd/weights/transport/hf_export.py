"""Export the live model as full Hugging Face tensors on every rank, for engines that take whole tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.box import Box
from megatron_tropd.weights.coordinates.hf_shapes import Index, hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import OwnedBox, owners, rank_boxes
from megatron_tropd.weights.coordinates.parameters import match_parameters

DEFAULT_BUCKET_BYTES = 512 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportBucket:
    """Consecutive HF tensors that travel together."""

    shapes: dict[str, Index]
    sent: dict[int, tuple[OwnedBox, ...]]
    """By sending rank: the boxes in its message, in order."""

    def elements(self, rank: int) -> int:
        """Return the number of elements in the message of ``rank``."""
        return sum(owned.box.numel for owned in self.sent[rank])


def make_buckets(arch: Architecture, layout: ParallelLayout, *, bucket_elements: int) -> tuple[ExportBucket, ...]:
    """Divide the HF tensors into buckets of at most ``bucket_elements``; a larger tensor has a bucket of its own."""
    by_name: dict[str, list[OwnedBox]] = {}
    for owned in owners(arch, layout):
        by_name.setdefault(owned.box.hf_name, []).append(owned)
    groups: list[list[str]] = []
    filled = 0
    shapes = hf_shapes(arch)
    for name, shape in shapes.items():
        elements = torch.Size(shape).numel()
        if not groups or filled + elements > bucket_elements:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += elements
    buckets = []
    for names in groups:
        sent: dict[int, list[OwnedBox]] = {}
        for owned in (owned for name in names for owned in by_name[name]):
            sent.setdefault(owned.rank, []).append(owned)
        buckets.append(
            ExportBucket(
                shapes={name: shapes[name] for name in names},
                sent={rank: tuple(sent[rank]) for rank in sorted(sent)},
            )
        )
    return tuple(buckets)


class HfExporter:
    """Plans once and then exports the model at every step.

    Every rank of the layout computes every box, so messages carry no header: per bucket each owner broadcasts
    one flat buffer, and every rank cuts it into boxes.  Peak memory above the model is about two
    buckets (never less than two of the largest tensor).

    Example:
        >>> exporter = HfExporter(arch, layout, rank, dtype=torch.bfloat16)
        >>> for name, tensor in exporter.export(local_parameters(model), groups.world): ...
    """

    def __init__(
        self, arch: Architecture, layout: ParallelLayout, rank: int, *, dtype: torch.dtype,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:  # fmt: skip
        self._layout, self._rank, self._dtype = layout, rank, dtype
        self._boxes = rank_boxes(arch, layout, rank)
        self.buckets = make_buckets(arch, layout, bucket_elements=max(1, bucket_bytes // dtype.itemsize))
        self.digest = hashlib.sha256(repr((self.buckets, dtype)).encode()).hexdigest()
        """sha256 of buckets and dtype, equal on every rank that has the same plan."""

    def export(
        self, params: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield (HF name, full tensor) for every HF tensor, on every rank, bit for bit.

        Collective over ``group`` (all ranks of the layout, in layout order): every rank must exhaust
        it.  Yielded tensors are new; they share no storage with the module or with each other.

        Args:
            params: Local parameters by GPTModel name (:func:`local_parameters`).
            group: May be None only where the layout has one rank.

        Raises:
            WeightMismatch, ValueError: the module or group does not fit; raised on that rank, before any message.
        """
        self._check_group(group)
        local: dict[str, Tensor] = {}
        for tensor, wanted in match_parameters(params, self._boxes):
            if tensor.dtype != self._dtype:
                raise ValueError(
                    f"{wanted.names[0]} is {tensor.dtype}, the exporter was made for {self._dtype}; "
                    "cast the module to one dtype"
                )
            local.update(dict.fromkeys(wanted.names, tensor.detach()))
        device = next(iter(local.values())).device
        return self._run(local, device, group)

    def _check_group(self, group: dist.ProcessGroup | None) -> None:
        size = 1 if group is None else dist.get_world_size(group)
        if size != self._layout.world_size:
            raise ValueError(f"the layout has {self._layout.world_size} ranks, the export group has {size}")
        if group is not None and dist.get_rank(group) != self._rank:
            raise ValueError(f"the exporter was made for rank {self._rank}, this is rank {dist.get_rank(group)}")

    def _run(
        self, local: dict[str, Tensor], device: torch.device, group: dist.ProcessGroup | None
    ) -> Iterator[tuple[str, Tensor]]:
        for bucket in self.buckets:
            full = {name: torch.empty(shape, dtype=self._dtype, device=device) for name, shape in bucket.shapes.items()}
            if group is None or self._layout.world_size == 1:
                for owned in bucket.sent[self._rank]:
                    full[owned.box.hf_name][owned.box.hf_slices].copy_(_piece(local, owned))
            else:
                self._exchange(bucket, local, full, device, group)
            while full:  # keep no reference: the caller decides how long a tensor lives
                name = next(iter(full))
                yield name, full.pop(name)

    def _exchange(
        self, bucket: ExportBucket, local: dict[str, Tensor], full: dict[str, Tensor], device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:  # fmt: skip
        in_flight = []
        for owner, owned_boxes in bucket.sent.items():
            message = torch.empty(bucket.elements(owner), dtype=self._dtype, device=device)
            if owner == self._rank:
                for owned, part in zip(owned_boxes, _cut(message, [o.box for o in owned_boxes]), strict=True):
                    part.copy_(_piece(local, owned))
            # Broadcast as bytes, so that no backend can change a bit pattern (NaN payloads).
            work = dist.broadcast(message.view(torch.uint8), group=group, group_src=owner, async_op=True)
            in_flight.append((work, message, [owned.box for owned in owned_boxes]))
        for work, message, boxes in in_flight:
            work.wait()
            for box, part in zip(boxes, _cut(message, boxes), strict=True):
                full[box.hf_name][box.hf_slices].copy_(part)


def _piece(local: Mapping[str, Tensor], owned: OwnedBox) -> Tensor:
    return local[owned.names[0]][owned.box.local_slices]


def _cut(message: Tensor, boxes: list[Box]) -> Iterator[Tensor]:
    """Yield views of the boxes that lie one after the other in ``message``."""
    position = 0
    for box in boxes:
        yield message[position : position + box.numel].view(box.size)
        position += box.numel


def export_hf(
    params: Mapping[str, Tensor], arch: Architecture, layout: ParallelLayout, group: dist.ProcessGroup | None,
    *, bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """Export once without keeping the plan; see :meth:`HfExporter.export`."""
    rank = 0 if group is None else dist.get_rank(group)
    exporter = HfExporter(
        arch, layout, rank, dtype=next(iter(params.values())).dtype, bucket_bytes=bucket_bytes,
    )  # fmt: skip
    return exporter.export(params, group)
