"""How one message of a plan gets from its sender to its receiver: over the group, or in shared memory.

    point to point    header and payload are one message of the group
    shared memory     the payload stays in the sender's staging memory, which the receiver has opened; the header
                      is a message of the group, and so is the word that the receiver has unpacked it

The sender may fill a half of its staging memory again when the messages in it are on the other side, or are
taken.  Both sides work through the buckets in the same order and a receiver says "taken" before it waits for
a later bucket, so the lowest unfinished bucket of all ranks can always go on: nobody waits in a circle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_tropd.weights.plan.bucketing import HEADER_BYTES
from megatron_tropd.weights.plan.types import Message
from megatron_tropd.weights.transport.message import Header, Kind, describe, disagreement
from megatron_tropd.weights.transport.p2p import Flight, Wire

DATA_TAG, TAKEN_TAG = 2, 4


class Sending(Protocol):
    """A message on its way, seen from its sender."""

    def finish(self) -> None:
        """Until its memory may be used again.

        Raises:
            TransportError: the receiver is gone, silent or confused.
        """


class Arrival(Protocol):
    """A message on its way, seen from its receiver."""

    @property
    def part(self) -> Tensor:
        """Its memory; the payload lies behind ``HEADER_BYTES``."""

    def wait(self) -> Tensor:
        """Until it has arrived; its header [uint8].

        Raises:
            TransportError: the sender is gone or silent.
        """

    def release(self, header: Header) -> list[Flight]:
        """Its memory is no longer needed; what must be waited for before the update ends."""


class Channel(Protocol):
    """Between one sender and one receiver."""

    shared: bool

    def send(self, message: Message, header: Header, part: Tensor, peer: int) -> Sending:
        """Begin to send ``part``, whose payload is in place."""

    def receive(self, message: Message, part: Tensor) -> Arrival:
        """Expect a message in ``part``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _SentWhole:
    flight: Flight

    def finish(self) -> None:
        self.flight.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class _ArrivingWhole:
    flight: Flight
    part: Tensor

    def wait(self) -> Tensor:
        self.flight.wait()
        return self.part[:HEADER_BYTES]

    def release(self, header: Header) -> list[Flight]:
        return []


class PointToPoint:
    """Everything over the group, whose tensors are where the weights are."""

    shared = False

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def send(self, message: Message, header: Header, part: Tensor, peer: int) -> Sending:
        """Header and payload as one message."""
        part[:HEADER_BYTES].copy_(self._wire.frame(header))
        return _SentWhole(flight=self._wire.send(part, peer, DATA_TAG, describe(message)))

    def receive(self, message: Message, part: Tensor) -> Arrival:
        """The same."""
        return _ArrivingWhole(flight=self._wire.receive(part, message.source, DATA_TAG, describe(message)), part=part)


def _settle(memory: Tensor) -> None:
    """Until the GPU has done what was asked of it with ``memory``: the other process has streams of its own."""
    if memory.is_cuda:
        torch.cuda.synchronize(memory.device)


def _taken(header: Header) -> Header:
    return Header(
        kind=Kind.TAKEN, version=header.version, bucket=header.bucket, digest=header.digest, on_gpu=header.on_gpu
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Announced:
    announced: Flight
    taken: Flight
    expected: Header

    def finish(self) -> None:
        self.announced.wait()
        self.taken.wait()
        if wrong := disagreement(self.taken.data, self.expected):
            raise self.taken.wire.lost(self.taken.what, wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lying:
    wire: Wire
    message: Message
    flight: Flight
    part: Tensor

    def wait(self) -> Tensor:
        self.flight.wait()
        return self.flight.data

    def release(self, header: Header) -> list[Flight]:
        _settle(self.part)
        frame = self.wire.frame(_taken(header))
        return [self.wire.send(frame, self.message.source, TAKEN_TAG, f"answer to {describe(self.message)}")]


class SharedMemory:
    """Payloads in memory both sides have open; ``wire`` carries frames in host memory."""

    shared = True

    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def send(self, message: Message, header: Header, part: Tensor, peer: int) -> Sending:
        """Announce what lies in ``part``, which the receiver sees too."""
        _settle(part)
        what = describe(message)
        return _Announced(
            announced=self._wire.send(self._wire.frame(header), peer, DATA_TAG, what),
            taken=self._wire.receive(self._wire.empty(), peer, TAKEN_TAG, what),
            expected=_taken(header),
        )

    def receive(self, message: Message, part: Tensor) -> Arrival:
        """Expect the announcement; ``part`` is the sender's memory."""
        flight = self._wire.receive(self._wire.empty(), message.source, DATA_TAG, describe(message))
        return _Lying(wire=self._wire, message=message, flight=flight, part=part)
