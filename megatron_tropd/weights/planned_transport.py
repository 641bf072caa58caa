"""Carrying out a weight plan between ranks: point to point, bucket by bucket, every byte checked.

    hello        every pair that will talk compares plan digest and version before any data moves
    buckets      one message per pair and bucket: header (version, digest, bucket, checksum) and payload
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
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.weights.buckets import HEADER_BYTES
from megatron_tropd.weights.message import Header, Kind, TransportError, checksum, describe, difference
from megatron_tropd.weights.plan import STAGING_HALVES, Message, WeightPlan
from megatron_tropd.weights.staging import Staging, by_bucket, check_parameters

HELLO_TAG, DATA_TAG, ACKNOWLEDGE_TAG = 1, 2, 3
POLL_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """One update on one rank."""

    version: int
    payload_bytes: int
    messages: int
    seconds: float
    staging_bytes: int
    """Memory above the weights."""


class _Endpoint:
    """What sender and receiver have in common: peers, staging memory, waiting."""

    def __init__(self, plan: WeightPlan, messages: tuple[Message, ...], group: Any, me: int, timeout_s: float) -> None:
        if group.size() != plan.world_size or group.rank() != me:
            raise ValueError(
                f"the plan needs a group of {plan.world_size} ranks in which this is rank {me}; the group has "
                f"{group.size()} and this is rank {group.rank()}"
            )
        self.plan, self.timeout_s = plan, timeout_s
        self.broken = ""
        """Why the group cannot be used any more, empty while it can."""
        self._group, self._buckets = group, by_bucket(messages)
        self._num_messages = len(messages)
        self._device = torch.device("cpu")

    def _prepare(self, params: dict[str, Tensor]) -> None:
        self._params = params
        self._device = next((tensor.device for tensor in params.values()), self._device)
        self._staging = Staging(self._buckets, self.plan.itemsize, self._device)

    @property
    def staging_bytes(self) -> int:
        """Memory this holds above the weights; at most the plan's ``bucket_bytes``."""
        return self._staging.num_bytes

    def _header(self, kind: Kind, version: int, **fields: int) -> Header:
        return Header(
            kind=kind, version=version, digest=self.plan.digest, on_gpu=self._device.type != "cpu", **fields
        )  # fmt: skip

    def _frame(self, header: Header) -> Tensor:
        return torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8).to(self._device)

    def _start(self, what: str, call: Any, data: Tensor, peer: int, tag: int) -> Any:
        try:
            return call([data], peer, tag)
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def _send(self, data: Tensor, peer: int, tag: int, what: str) -> Any:
        return self._start(what, self._group.send, data, peer, tag)

    def _receive(self, data: Tensor, peer: int, tag: int, what: str) -> Any:
        return self._start(what, self._group.recv, data, peer, tag)

    def _lost(self, what: str, error: object) -> TransportError:
        self.broken = f"{what} failed: {str(error).splitlines()[0]}"
        return TransportError(
            f"{self.broken} (each wait may take {self.timeout_s:g} s); make a new group and push again"
        )

    def _wait(self, work: Any, what: str) -> None:
        """Until ``work`` is done on this rank's device.

        Raises:
            TransportError: the peer is gone, or the timeout has passed.
        """
        try:
            if self._device.type == "cpu":
                work.wait(timedelta(seconds=self.timeout_s))
                return
            deadline = time.monotonic() + self.timeout_s
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError("timed out")
                time.sleep(POLL_S)
            work.wait()
        except RuntimeError as error:
            raise self._lost(what, error) from error

    def _greet(self, version: int, peers: Mapping[int, str]) -> None:
        """Compare plan digest and version with every peer before any data moves."""
        if self.broken:
            raise TransportError(f"this group was given up: {self.broken}; make a new one")
        mine = self._header(Kind.HELLO, version)
        frame = self._frame(mine)
        answers = {peer: torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self._device) for peer in peers}
        works = [self._receive(answers[peer], peer, HELLO_TAG, f"hello of {name}") for peer, name in peers.items()]
        greetings = [self._send(frame, peer, HELLO_TAG, f"hello to {name}") for peer, name in peers.items()]
        for work, name in zip([*works, *greetings], [*peers.values()] * 2, strict=True):
            self._wait(work, f"hello with {name}")
        for peer, name in peers.items():
            if wrong := self._compare(answers[peer], mine):
                raise TransportError(f"{name} and this rank do not agree on the update: {wrong}")

    def _compare(self, frame: Tensor, expected: Header) -> str:
        try:
            return difference(Header.unpack(bytes(frame[:HEADER_BYTES].tolist())), expected)
        except ValueError as error:
            return str(error)


def _extend(running: int, value: int) -> int:
    """A checksum of checksums."""
    return zlib.crc32(struct.pack("<I", value), running)


class PlannedSender(_Endpoint):
    """Sends one trainer rank's part of every update.

    Example:
        >>> sender = PlannedSender(plan, rank, local_parameters(model), group, timeout_s=60)
        >>> sender.push(version)        # every trainer rank, while every engine rank receives
    """

    def __init__(
        self, plan: WeightPlan, rank: int, params: Mapping[str, Tensor], group: Any, *, timeout_s: float
    ) -> None:
        messages = plan.for_sender(rank)
        super().__init__(plan, messages, group, rank, timeout_s)
        wanted = [(copy.source_names, copy, copy.source_slices) for message in messages for copy in message.copies]
        self._prepare(check_parameters(params, wanted, plan.dtype))
        self._peers = {
            plan.group_rank(m.engine, m.engine_rank): f"engine {m.engine} rank {m.engine_rank}" for m in messages
        }

    @torch.no_grad()
    def push(self, version: int) -> TransferReport:
        """Send the parameters as they are now, and wait until every receiver has acknowledged them.

        Raises:
            TransportError: a receiver refused or did not answer in time; nobody may take ``version`` for
                delivered.
        """
        start, sums, sent = time.monotonic(), dict.fromkeys(self._peers, 0), dict.fromkeys(self._peers, 0)
        self._greet(version, self._peers)
        flying: deque[list[tuple[Any, str]]] = deque()
        for number, bucket in enumerate(self._buckets):
            if len(flying) == STAGING_HALVES:  # the half that this bucket needs is still on the wire
                self._finish(flying.popleft())
            flying.append([])
            for message, part in zip(bucket, self._staging.cut(number, bucket), strict=True):
                peer = self.plan.group_rank(message.engine, message.engine_rank)
                total = self._pack(message, part, version)
                sums[peer], sent[peer] = _extend(sums[peer], total), sent[peer] + message.payload_bytes
                flying[-1].append((self._send(part, peer, DATA_TAG, describe(message)), describe(message)))
        for works in flying:
            self._finish(works)
        self._await_acknowledgements(version, sums, sent)
        return TransferReport(
            version=version, payload_bytes=sum(sent.values()), messages=self._num_messages,
            seconds=time.monotonic() - start, staging_bytes=self.staging_bytes,
        )  # fmt: skip

    def _pack(self, message: Message, part: Tensor, version: int) -> int:
        for copy, view in zip(message.copies, self._staging.rectangles(part, message), strict=True):
            view.copy_(self._params[copy.source_names[0]][copy.source_slices])
        total = checksum(part[HEADER_BYTES:])
        header = self._header(
            Kind.DATA, version, bucket=message.bucket, checksum=total, payload_bytes=message.payload_bytes
        )
        part[:HEADER_BYTES].copy_(self._frame(header))
        return total

    def _finish(self, works: list[tuple[Any, str]]) -> None:
        for work, what in works:
            self._wait(work, what)

    def _await_acknowledgements(self, version: int, sums: Mapping[int, int], sent: Mapping[int, int]) -> None:
        frames = {peer: torch.empty(HEADER_BYTES, dtype=torch.uint8, device=self._device) for peer in self._peers}
        what = "acknowledgement of {}".format
        works = {
            peer: self._receive(frames[peer], peer, ACKNOWLEDGE_TAG, what(name)) for peer, name in self._peers.items()
        }
        problems = []
        for peer, name in self._peers.items():
            self._wait(works[peer], what(name))
            expected = self._header(Kind.ACKNOWLEDGED, version, checksum=sums[peer], payload_bytes=sent[peer])
            if wrong := self._compare(frames[peer], expected):
                problems.append(f"{name} did not take version {version}: {wrong}")
        if problems:
            raise TransportError("; ".join(problems))


class PlannedReceiver(_Endpoint):
    """Receives one engine rank's part of every update into its own parameters, in place.

    ``version`` is the last update that arrived whole; while ``partial``, the weights are a mixture and the
    engine must not answer.
    """

    def __init__(
        self, plan: WeightPlan, engine: int, engine_rank: int, params: Mapping[str, Tensor], group: Any,
        *, timeout_s: float, version: int = -1,
    ) -> None:  # fmt: skip
        messages = plan.for_receiver(engine, engine_rank)
        super().__init__(plan, messages, group, plan.group_rank(engine, engine_rank), timeout_s)
        wanted = [((copy.name,), copy, copy.slices) for message in messages for copy in message.copies]
        self._prepare(check_parameters(params, wanted, plan.dtype))
        self._name = f"engine {engine} rank {engine_rank}"
        self._peers = {message.source: f"trainer rank {message.source}" for message in messages}
        self.version, self.partial = version, False

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
        self._greet(version, self._peers)
        self.partial = True
        wrong, sums, arrived = self._take_buckets(version)
        kind = Kind.REFUSED if wrong else Kind.ACKNOWLEDGED
        answers = []
        for peer, name in self._peers.items():
            frame = self._frame(self._header(kind, version, checksum=sums[peer], payload_bytes=arrived[peer]))
            answers.append((self._send(frame, peer, ACKNOWLEDGE_TAG, f"answer to {name}"), frame, name))
        for work, _, name in answers:  # the frames must live until then
            self._wait(work, f"answer to {name}")
        if wrong:
            raise TransportError(f"{self._name} refused version {version} and is partial: {wrong}")
        self.version, self.partial = version, False
        return TransferReport(
            version=version, payload_bytes=sum(arrived.values()), messages=self._num_messages,
            seconds=time.monotonic() - start, staging_bytes=self.staging_bytes,
        )  # fmt: skip

    def _take_buckets(self, version: int) -> tuple[str, dict[int, int], dict[int, int]]:
        """(first thing that was wrong, checksum and bytes by peer); the next bucket flies while one is unpacked."""
        wrong, sums, arrived = "", dict.fromkeys(self._peers, 0), dict.fromkeys(self._peers, 0)
        flying = self._post(0)
        for number, bucket in enumerate(self._buckets):
            following = self._post(number + 1)
            for message, (work, part) in zip(bucket, flying, strict=True):
                self._wait(work, describe(message))
                total = checksum(part[HEADER_BYTES:])
                expected = self._header(
                    Kind.DATA, version, bucket=message.bucket, checksum=total, payload_bytes=message.payload_bytes
                )
                if not wrong and (reason := self._compare(part, expected)):
                    wrong = f"{describe(message)}: {reason}"
                if not wrong:
                    self._unpack(message, part)
                sums[message.source] = _extend(sums[message.source], total)
                arrived[message.source] += message.payload_bytes
            flying = following
        return wrong, sums, arrived

    def _post(self, number: int) -> list[tuple[Any, Tensor]]:
        if number >= len(self._buckets):
            return []
        bucket = self._buckets[number]
        parts = self._staging.cut(number, bucket)
        return [
            (self._receive(part, message.source, DATA_TAG, describe(message)), part)
            for message, part in zip(bucket, parts, strict=True)
        ]

    def _unpack(self, message: Message, part: Tensor) -> None:
        for copy, view in zip(message.copies, self._staging.rectangles(part, message), strict=True):
            self._params[copy.name][copy.slices].copy_(view)
