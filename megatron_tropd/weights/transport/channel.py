"""How one message of a plan gets from its sender to its receiver: over the group, or in shared memory.

    point to point    header and payload are one message of the group
    shared memory     the payload stays in the sender's staging memory, which the receiver has opened; the header
                      is a message of the group, and so is the receiver's answer TAKEN, sent when it has unpacked

The sender may fill a half of its staging memory again when the messages in it have been transferred, or are
taken.  There is no deadlock: both sides work through the buckets in the same order, and a receiver sends TAKEN
before it waits for a later bucket, so the lowest unfinished bucket of all ranks can always make progress.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_tropd.weights.plan.bucketing import HEADER_BYTES
from megatron_tropd.weights.plan.types import Message
from megatron_tropd.weights.transport.message import Header, Kind, disagreement, message_name
from megatron_tropd.weights.transport.p2p import P2PGroup, P2PTransfer

DATA_TAG, TAKEN_TAG = 2, 4


class PendingSend(Protocol):
    """A message that its sender has begun to send."""

    def finish(self) -> None:
        """Wait until the memory of the message may be used again.

        Raises:
            TransportError: the receiver is gone, did not answer in time, or gave a wrong answer.
        """


class PendingReceive(Protocol):
    """A message that its receiver has begun to receive."""

    @property
    def part(self) -> Tensor:
        """Memory of the message; the payload begins at byte ``HEADER_BYTES``."""

    def wait(self) -> Tensor:
        """Wait until the message has arrived, and return its header [uint8].

        Raises:
            TransportError: the sender is gone, or did not send in time.
        """

    def release(self, header: Header) -> list[P2PTransfer]:
        """Release the message's memory; return the transfers to wait for before the update ends."""


class Channel(Protocol):
    """Carries messages between this rank and a peer.  ``shared`` is True if payloads stay in shared memory."""

    shared: bool

    def send(self, message: Message, header: Header, part: Tensor, peer: int) -> PendingSend:
        """Begin to send ``part``, whose payload is in place."""

    def receive(self, message: Message, part: Tensor) -> PendingReceive:
        """Begin to receive a message in ``part``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _P2PSend:
    transfer: P2PTransfer

    def finish(self) -> None:
        self.transfer.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class _P2PReceive:
    transfer: P2PTransfer
    part: Tensor

    def wait(self) -> Tensor:
        self.transfer.wait()
        return self.part[:HEADER_BYTES]

    def release(self, header: Header) -> list[P2PTransfer]:
        return []


class P2PChannel:
    """Header and payload go over the group, whose tensors are on the device of the weights."""

    shared = False

    def __init__(self, p2p: P2PGroup) -> None:
        self._p2p = p2p

    def send(self, message: Message, header: Header, part: Tensor, peer: int) -> PendingSend:
        """Begin to send header and payload as one message."""
        part[:HEADER_BYTES].copy_(self._p2p.frame(header))
        return _P2PSend(transfer=self._p2p.send(part, peer, DATA_TAG, message_name(message)))

    def receive(self, message: Message, part: Tensor) -> PendingReceive:
        """Begin to receive header and payload as one message."""
        return _P2PReceive(transfer=self._p2p.receive(part, message.source, DATA_TAG, message_name(message)), part=part)


def _synchronize(memory: Tensor) -> None:
    """Wait until the GPU has finished its work on ``memory``, because the other process uses other streams."""
    if memory.is_cuda:
        torch.cuda.synchronize(memory.device)


def _taken_header(header: Header) -> Header:
    return Header(
        kind=Kind.TAKEN, version=header.version, bucket=header.bucket, digest=header.digest, on_gpu=header.on_gpu
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedSend:
    announced: P2PTransfer
    taken: P2PTransfer
    expected: Header

    def finish(self) -> None:
        self.announced.wait()
        self.taken.wait()
        if wrong := disagreement(self.taken.data, self.expected):
            raise self.taken.p2p.lost(self.taken.what, wrong)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SharedReceive:
    p2p: P2PGroup
    message: Message
    transfer: P2PTransfer
    part: Tensor

    def wait(self) -> Tensor:
        self.transfer.wait()
        return self.transfer.data

    def release(self, header: Header) -> list[P2PTransfer]:
        _synchronize(self.part)
        frame = self.p2p.frame(_taken_header(header))
        return [self.p2p.send(frame, self.message.source, TAKEN_TAG, f"answer to {message_name(self.message)}")]


class SharedMemoryChannel:
    """Payloads stay in memory that both sides have open; headers go over ``p2p``, in host memory."""

    shared = True

    def __init__(self, p2p: P2PGroup) -> None:
        self._p2p = p2p

    def send(self, message: Message, header: Header, part: Tensor, peer: int) -> PendingSend:
        """Send the header of the payload in ``part``, memory that the receiver has opened too."""
        _synchronize(part)
        what = message_name(message)
        return _SharedSend(
            announced=self._p2p.send(self._p2p.frame(header), peer, DATA_TAG, what),
            taken=self._p2p.receive(self._p2p.empty(), peer, TAKEN_TAG, what),
            expected=_taken_header(header),
        )

    def receive(self, message: Message, part: Tensor) -> PendingReceive:
        """Begin to receive the header; ``part`` is the sender's memory."""
        transfer = self._p2p.receive(self._p2p.empty(), message.source, DATA_TAG, message_name(message))
        return _SharedReceive(p2p=self._p2p, message=message, transfer=transfer, part=part)
