"""The engine's end of an update."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.weights.plan.bucketing import HEADER_BYTES
from megatron_tropd.weights.plan.types import Message, WeightPlan
from megatron_tropd.weights.transport.channel import PendingReceive
from megatron_tropd.weights.transport.endpoint import (
    ACKNOWLEDGE_TAG,
    Endpoint,
    TransferReport,
    extend_checksum,
    take_next,
)
from megatron_tropd.weights.transport.message import Kind, TransportError, checksum, disagreement, message_name
from megatron_tropd.weights.transport.shared_memory_handshake import accept
from megatron_tropd.weights.transport.staging import Staging, by_bucket, check_parameters, half_sizes


class PlannedReceiver(Endpoint):
    """Receives one engine rank's part of every update into its own parameters, in place.

    ``version`` is the last update that arrived whole; while ``partial``, the weights are a mixture and the
    engine must not answer.  With ``shared`` the constructor opens its senders' memory where it can, and
    blocks until all have offered theirs.
    """

    def __init__(
        self, plan: WeightPlan, engine: int, engine_rank: int, params: Mapping[str, Tensor], group: Any,
        *, timeout_s: float, version: int = -1, frames: Any | None = None, shared: bool = False,
    ) -> None:  # fmt: skip
        messages = plan.for_receiver(engine, engine_rank)
        wanted = [((copy.name,), copy, copy.slices) for message in messages for copy in message.copies]
        super().__init__(
            plan, messages, check_parameters(params, wanted, plan.dtype),
            {message.source: f"trainer rank {message.source}" for message in messages}, group=group,
            frames=frames, me=plan.group_rank(engine, engine_rank), timeout_s=timeout_s,
        )  # fmt: skip
        self._name = f"engine {engine} rank {engine_rank}"
        self.version, self.partial = version, False
        opened: dict[int, list[Tensor]] = {}
        if shared:
            theirs = {source: by_bucket(plan.for_sender(source)) for source in self._peers}
            sizes = {source: half_sizes(buckets) for source, buckets in theirs.items()}
            opened = accept(self._control, sizes, self._peers)
            self._share_with(opened)
        self._open_pairs(self._data.receive)
        own = [[message for message in bucket if message.source not in opened] for bucket in self._buckets]
        self._staging = Staging(own, plan.itemsize, self._data.empty)
        self._parts = _staged_parts(self._staging, own)
        for source, halves in opened.items():
            view = Staging(theirs[source], plan.itemsize, partial(take_next, iter(halves)))
            self._parts.update(_staged_parts(view, theirs[source]))

    @torch.no_grad()
    def receive(self, version: int) -> TransferReport:
        """Receive the update ``version``, which must be later than the last whole one.

        Raises:
            TransportError: ``version`` is not later, or the update did not arrive whole; ``partial`` is set if
                the hellos had succeeded.
        """
        if version <= self.version:
            raise TransportError(f"{self._name} has version {self.version}; version {version} is not later")
        start = time.monotonic()
        self._greet(version)
        self.partial = True
        wrong, sums, arrived = self._take_buckets(version)
        kind, p2p, answers = Kind.REFUSED if wrong else Kind.ACKNOWLEDGED, self._control, []
        for peer, name in self._peers.items():
            frame = p2p.frame(self._header(kind, version, checksum=sums[peer], payload_bytes=arrived[peer]))
            answers.append(p2p.send(frame, peer, ACKNOWLEDGE_TAG, f"answer to {name}"))
        for answer in answers:
            answer.wait()
        if wrong:
            raise TransportError(f"{self._name} refused version {version} and is partial: {wrong}")
        self.version, self.partial = version, False
        return self._report(version, arrived, start)

    def _take_buckets(self, version: int) -> tuple[str, dict[int, int], dict[int, int]]:
        """Receive all buckets, the next one while one is unpacked.

        Return (the first error, checksum by peer, payload bytes by peer).
        """
        wrong, sums, arrived = "", dict.fromkeys(self._peers, 0), dict.fromkeys(self._peers, 0)
        in_flight, answers = self._post(0), []
        for number, bucket in enumerate(self._buckets):
            following = self._post(number + 1)
            for message, arrival in zip(bucket, in_flight, strict=True):
                header, part = arrival.wait(), arrival.part
                total = checksum(part[HEADER_BYTES:])
                expected = self._header(
                    Kind.DATA, version, bucket=message.bucket, checksum=total, payload_bytes=message.payload_bytes
                )
                if not wrong and (reason := disagreement(header, expected)):
                    wrong = f"{message_name(message)}: {reason}"
                if not wrong:
                    self._unpack(message, part)
                sums[message.source] = extend_checksum(sums[message.source], total)
                arrived[message.source] += message.payload_bytes
                answers += arrival.release(expected)
            in_flight = following
        for answer in answers:
            answer.wait()
        return wrong, sums, arrived

    def _post(self, number: int) -> list[PendingReceive]:
        if number >= len(self._buckets):
            return []
        return [
            self._channels[message.source].receive(message, self._parts[_key(message)])
            for message in self._buckets[number]
        ]

    def _unpack(self, message: Message, part: Tensor) -> None:
        for copy, view in zip(message.copies, self._staging.rectangles(part, message), strict=True):
            self._params[copy.name][copy.slices].copy_(view)


def _key(message: Message) -> tuple[int, int, int, int]:
    return message.source, message.bucket, message.engine, message.engine_rank


def _staged_parts(staging: Staging, buckets: list[list[Message]]) -> dict[tuple[int, int, int, int], Tensor]:
    """Return the memory of each message, by its key."""
    return {
        _key(message): part
        for number, bucket in enumerate(buckets)
        for message, part in zip(bucket, staging.cut(number, bucket), strict=True)
    }
