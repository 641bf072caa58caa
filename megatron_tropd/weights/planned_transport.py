"""Carrying out a weight plan between ranks: point to point, bucket by bucket, every byte checked.

    hello        every pair that will talk compares plan digest and version before any data moves
    buckets      one message per pair and bucket: header (version, digest, bucket, checksum) and payload, over the
                 group or in shared memory (``channel.py``)
    acknowledge  each receiver tells each of its senders how many bytes arrived and the checksum over all of them

A receiver that finds a message wrong writes nothing more, takes the rest off the wire, refuses the update to
all its senders and is *partial*: its weights are a mixture until a whole update has arrived.  A rank that
waits longer than the timeout, or whose peer is gone, gives the group up: make a new one and push again.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.weights.buckets import HEADER_BYTES
from megatron_tropd.weights.channel import Arrival, Channel, PointToPoint, Sending, SharedMemory
from megatron_tropd.weights.message import Header, Kind, TransportError, checksum, describe, disagreement
from megatron_tropd.weights.plan import STAGING_HALVES, Message, WeightPlan
from megatron_tropd.weights.shared_memory import SharedSegment
from megatron_tropd.weights.sharing import accept, offer
from megatron_tropd.weights.staging import Staging, by_bucket, check_parameters, half_sizes
from megatron_tropd.weights.wire import Flight, Wire

HELLO_TAG, ACKNOWLEDGE_TAG, OPEN_TAG = 1, 3, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """One update on one rank."""

    version: int
    payload_bytes: int
    shared_bytes: int
    """Of the payload, what went through shared memory."""
    messages: int
    seconds: float
    staging_bytes: int
    """Memory above the weights."""


class _Endpoint:
    """What sender and receiver have in common: parameters, peers, groups.

    ``group`` carries payloads, where the weights are.  ``frames`` is a gloo group of the same ranks (None: the
    same one, which then is gloo): hellos, acknowledgements and the headers of shared memory are its.
    """

    _staging: Staging

    def __init__(
        self, plan: WeightPlan, messages: tuple[Message, ...], params: dict[str, Tensor], peers: Mapping[int, str],
        *, group: Any, frames: Any | None, me: int, timeout_s: float,
    ) -> None:  # fmt: skip
        if group.size() != plan.world_size or group.rank() != me:
            raise ValueError(
                f"the plan needs a group of {plan.world_size} ranks in which this is rank {me}; the group has "
                f"{group.size()} and this is rank {group.rank()}"
            )
        self.plan, self._params, self._peers = plan, params, peers
        self._buckets, self._num_messages = by_bucket(messages), len(messages)
        self._device = next((tensor.device for tensor in params.values()), torch.device("cpu"))
        self._data = self._control = Wire(group, self._device, timeout_s)
        if frames is not None:
            self._control = Wire(frames, torch.device("cpu"), timeout_s)
        self._channels: Mapping[int, Channel] = dict.fromkeys(peers, PointToPoint(self._data))

    def _open_pairs(self, begin: Callable[[Tensor, int, int, str], Flight]) -> None:
        """Have NCCL make its communicator of every pair, in an order that is one for all ranks.

        The first message of a pair makes it, in a call that waits for the other side; met in the order of
        buckets, ranks could wait for each other in a circle.
        """
        if self._data.device.type == "cpu":
            return
        for peer in sorted(self._peers):
            if not self._channels[peer].shared:
                begin(self._data.empty(1), peer, OPEN_TAG, f"first message with {self._peers[peer]}").wait()

    def _share_with(self, peers: Iterable[int]) -> None:
        shared = SharedMemory(self._control)
        self._channels = {**self._channels, **dict.fromkeys(peers, shared)}

    @property
    def broken(self) -> str:
        """Why the groups cannot be used any more, empty while they can."""
        return self._control.broken or self._data.broken

    @property
    def staging_bytes(self) -> int:
        """Memory this holds above the weights; at most the plan's ``bucket_bytes``."""
        return self._staging.num_bytes

    def _report(self, version: int, moved: Mapping[int, int], start: float) -> TransferReport:
        return TransferReport(
            version=version, payload_bytes=sum(moved.values()),
            shared_bytes=sum(moved[peer] for peer in moved if self._channels[peer].shared),
            messages=self._num_messages, seconds=time.monotonic() - start, staging_bytes=self.staging_bytes,
        )  # fmt: skip

    def _header(self, kind: Kind, version: int, **fields: int) -> Header:
        return Header(
            kind=kind, version=version, digest=self.plan.digest, on_gpu=self._device.type != "cpu", **fields
        )  # fmt: skip

    def _greet(self, version: int) -> None:
        """Compare plan digest and version with every peer before any data moves."""
        if self.broken:
            raise TransportError(f"this group was given up: {self.broken}; make a new one")
        mine, wire, names = self._header(Kind.HELLO, version), self._control, self._peers
        frame = wire.frame(mine)
        answers = {peer: wire.receive(wire.empty(), peer, HELLO_TAG, f"hello with {names[peer]}") for peer in names}
        greetings = [wire.send(frame, peer, HELLO_TAG, f"hello with {names[peer]}") for peer in names]
        for flight in (*answers.values(), *greetings):
            flight.wait()
        for peer, name in names.items():
            if wrong := disagreement(answers[peer].data, mine):
                raise TransportError(f"{name} and this rank do not agree on the update: {wrong}")


def _extend(running: int, value: int) -> int:
    """A checksum of checksums."""
    return zlib.crc32(struct.pack("<I", value), running)


def _next(halves: Iterator[Tensor], num_bytes: int) -> Tensor:
    """Memory that is there already, as :class:`Staging` asks for it."""
    return next(halves)


class PlannedSender(_Endpoint):
    """Sends one trainer rank's part of every update.

    With ``shared`` its staging memory is shared memory, which every receiver that can opens now: blocks
    until all receivers have answered.

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
        self._staging = Staging(self._buckets, plan.itemsize, partial(_next, halves))
        self._share_with(offer(self._control, segments, peers))
        self._open_pairs(self._data.send)

    @torch.no_grad()
    def push(self, version: int) -> TransferReport:
        """Send the parameters as they are now, and wait until every receiver has acknowledged them.

        Raises:
            TransportError: a receiver refused or did not answer in time; nobody may take ``version`` for
                delivered.
        """
        start, sums, sent = time.monotonic(), dict.fromkeys(self._peers, 0), dict.fromkeys(self._peers, 0)
        self._greet(version)
        flying: deque[list[Sending]] = deque()
        for number, bucket in enumerate(self._buckets):
            if len(flying) == STAGING_HALVES:  # the half that this bucket needs is still on the wire, or being read
                self._finish(flying.popleft())
            flying.append([])
            for message, part in zip(bucket, self._staging.cut(number, bucket), strict=True):
                peer = self.plan.group_rank(message.engine, message.engine_rank)
                header = self._pack(message, part, version)
                sums[peer], sent[peer] = _extend(sums[peer], header.checksum), sent[peer] + message.payload_bytes
                flying[-1].append(self._channels[peer].send(message, header, part, peer))
        for sendings in flying:
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

    def _finish(self, sendings: list[Sending]) -> None:
        for sending in sendings:
            sending.finish()

    def _await_acknowledgements(self, version: int, sums: Mapping[int, int], sent: Mapping[int, int]) -> None:
        wire, names = self._control, self._peers
        answers = {
            peer: wire.receive(wire.empty(), peer, ACKNOWLEDGE_TAG, f"acknowledgement of {names[peer]}")
            for peer in names
        }
        problems = []
        for peer, name in names.items():
            answers[peer].wait()
            expected = self._header(Kind.ACKNOWLEDGED, version, checksum=sums[peer], payload_bytes=sent[peer])
            if wrong := disagreement(answers[peer].data, expected):
                problems.append(f"{name} did not take version {version}: {wrong}")
        if problems:
            raise TransportError("; ".join(problems))


class PlannedReceiver(_Endpoint):
    """Receives one engine rank's part of every update into its own parameters, in place.

    ``version`` is the last update that arrived whole; while ``partial``, the weights are a mixture and the
    engine must not answer.  With ``shared`` it opens its senders' memory now, where it can: blocks until
    all have offered it.
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
        self._parts = _places(self._staging, own)
        for source, halves in opened.items():
            view = Staging(theirs[source], plan.itemsize, partial(_next, iter(halves)))
            self._parts.update(_places(view, theirs[source]))

    @torch.no_grad()
    def receive(self, version: int) -> TransferReport:
        """Take the update ``version``, which must be later than the last whole one.

        Raises:
            TransportError: it is not, or the update did not arrive whole; if data had begun to arrive,
                ``partial`` is set.
        """
        if version <= self.version:
            raise TransportError(f"{self._name} has version {self.version}; version {version} is not later")
        start = time.monotonic()
        self._greet(version)
        self.partial = True
        wrong, sums, arrived = self._take_buckets(version)
        kind, wire, answers = Kind.REFUSED if wrong else Kind.ACKNOWLEDGED, self._control, []
        for peer, name in self._peers.items():
            frame = wire.frame(self._header(kind, version, checksum=sums[peer], payload_bytes=arrived[peer]))
            answers.append(wire.send(frame, peer, ACKNOWLEDGE_TAG, f"answer to {name}"))
        for answer in answers:
            answer.wait()
        if wrong:
            raise TransportError(f"{self._name} refused version {version} and is partial: {wrong}")
        self.version, self.partial = version, False
        return self._report(version, arrived, start)

    def _take_buckets(self, version: int) -> tuple[str, dict[int, int], dict[int, int]]:
        """(first thing that was wrong, checksum and bytes by peer); the next bucket flies while one is unpacked."""
        wrong, sums, arrived = "", dict.fromkeys(self._peers, 0), dict.fromkeys(self._peers, 0)
        flying, answers = self._post(0), []
        for number, bucket in enumerate(self._buckets):
            following = self._post(number + 1)
            for message, arrival in zip(bucket, flying, strict=True):
                header, part = arrival.wait(), arrival.part
                total = checksum(part[HEADER_BYTES:])
                expected = self._header(
                    Kind.DATA, version, bucket=message.bucket, checksum=total, payload_bytes=message.payload_bytes
                )
                if not wrong and (reason := disagreement(header, expected)):
                    wrong = f"{describe(message)}: {reason}"
                if not wrong:
                    self._unpack(message, part)
                sums[message.source] = _extend(sums[message.source], total)
                arrived[message.source] += message.payload_bytes
                answers += arrival.release(expected)
            flying = following
        for answer in answers:
            answer.wait()
        return wrong, sums, arrived

    def _post(self, number: int) -> list[Arrival]:
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


def _places(staging: Staging, buckets: list[list[Message]]) -> dict[tuple[int, int, int, int], Tensor]:
    """Where each message lies."""
    return {
        _key(message): part
        for number, bucket in enumerate(buckets)
        for message, part in zip(bucket, staging.cut(number, bucket), strict=True)
    }
