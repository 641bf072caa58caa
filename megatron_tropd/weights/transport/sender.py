"""The trainer's end of an update."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.weights.plan.bucketing import HEADER_BYTES
from megatron_tropd.weights.plan.types import STAGING_HALVES, Message, WeightPlan
from megatron_tropd.weights.transport.channel import PendingSend
from megatron_tropd.weights.transport.endpoint import (
    ACKNOWLEDGE_TAG,
    Endpoint,
    TransferReport,
    extend_checksum,
    take_next,
)
from megatron_tropd.weights.transport.message import Header, Kind, TransportError, checksum, disagreement
from megatron_tropd.weights.transport.shared_memory import SharedSegment
from megatron_tropd.weights.transport.shared_memory_handshake import offer
from megatron_tropd.weights.transport.staging import Staging, check_parameters, half_sizes


class PlannedSender(Endpoint):
    """Sends one trainer rank's part of every update.

    With ``shared`` its staging memory is shared memory, which its receivers open where they can; the constructor
    blocks until all of them have answered.

    Example:
        >>> sender = PlannedSender(plan, rank, local_parameters(model), group, timeout_s=60)
        >>> sender.push(version)        # every trainer rank, while every engine rank receives
    """

    def __init__(
        self, plan: WeightPlan, rank: int, params: Mapping[str, Tensor], group: Any, *, timeout_s: float,
        frames: Any | None = None, shared: bool = False,
    ) -> None:  # fmt: skip
        messages = plan.for_sender(rank)
        wanted = [(copy.source_names, copy, copy.source_slices) for message in messages for copy in message.copies]
        peers = {plan.group_rank(m.engine, m.engine_rank): f"engine {m.engine} rank {m.engine_rank}" for m in messages}
        super().__init__(
            plan, messages, check_parameters(params, wanted, plan.dtype), peers, group=group, frames=frames,
            me=rank, timeout_s=timeout_s,
        )  # fmt: skip
        if not shared:
            self._staging = Staging(self._buckets, plan.itemsize, self._data.empty)
            self._open_pairs(self._data.send)
            return
        segments = [SharedSegment(size, self._device) for size in half_sizes(self._buckets)]
        halves = iter([segment.memory for segment in segments])
        self._staging = Staging(self._buckets, plan.itemsize, partial(take_next, halves))
        self._share_with(offer(self._control, segments, peers))
        self._open_pairs(self._data.send)

    @torch.no_grad()
    def push(self, version: int) -> TransferReport:
        """Send the parameters as they are now, and wait until every receiver has acknowledged them.

        Raises:
            TransportError: a receiver refused or did not answer in time; ``version`` must then not be regarded
                as delivered.
        """
        start, sums, sent = time.monotonic(), dict.fromkeys(self._peers, 0), dict.fromkeys(self._peers, 0)
        self._greet(version)
        in_flight: deque[list[PendingSend]] = deque()
        for number, bucket in enumerate(self._buckets):
            if len(in_flight) == STAGING_HALVES:  # this bucket's half may still be in transit, or being read
                self._finish(in_flight.popleft())
            in_flight.append([])
            for message, part in zip(bucket, self._staging.cut(number, bucket), strict=True):
                peer = self.plan.group_rank(message.engine, message.engine_rank)
                header = self._pack(message, part, version)
                sums[peer], sent[peer] = (
                    extend_checksum(sums[peer], header.checksum),
                    sent[peer] + message.payload_bytes,
                )
                in_flight[-1].append(self._channels[peer].send(message, header, part, peer))
        for sendings in in_flight:
            self._finish(sendings)
        self._await_acknowledgements(version, sums, sent)
        return self._report(version, sent, start)

    def _pack(self, message: Message, part: Tensor, version: int) -> Header:
        for copy, view in zip(message.copies, self._staging.rectangles(part, message), strict=True):
            view.copy_(self._params[copy.source_names[0]][copy.source_slices])
        return self._header(
            Kind.DATA, version, bucket=message.bucket, checksum=checksum(part[HEADER_BYTES:]),
            payload_bytes=message.payload_bytes,
        )  # fmt: skip

    def _finish(self, sendings: list[PendingSend]) -> None:
        for sending in sendings:
            sending.finish()

    def _await_acknowledgements(self, version: int, sums: Mapping[int, int], sent: Mapping[int, int]) -> None:
        p2p, names = self._control, self._peers
        answers = {
            peer: p2p.receive(p2p.empty(), peer, ACKNOWLEDGE_TAG, f"acknowledgement of {names[peer]}") for peer in names
        }
        problems = []
        for peer, name in names.items():
            answers[peer].wait()
            expected = self._header(Kind.ACKNOWLEDGED, version, checksum=sums[peer], payload_bytes=sent[peer])
            if wrong := disagreement(answers[peer].data, expected):
                problems.append(f"{name} did not take version {version}: {wrong}")
        if problems:
            raise TransportError("; ".join(problems))
