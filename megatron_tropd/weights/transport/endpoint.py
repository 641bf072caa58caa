"""The part of an update that sender and receiver share: messages from rank to rank, with every byte checked.

    hello        every pair that will exchange data compares plan digest and version before any data moves
    buckets      one message per pair and bucket: header (version, digest, bucket, checksum) and payload, over the
                 group or in shared memory (``channel.py``)
    acknowledge  each receiver sends each of its senders the number of bytes that arrived and a checksum over the
                 checksums of their messages

A receiver that finds a message wrong writes nothing more, receives and discards the rest, refuses the update to
all its senders and is *partial*: its weights are a mixture until a whole update has arrived.  When a rank waits
longer than the timeout, or its peer is gone, the group cannot be used again: make a new one and push again.

The two ends are ``sender.py`` and ``receiver.py``.
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.weights.plan.types import Message, WeightPlan
from megatron_tropd.weights.transport.channel import Channel, P2PChannel, SharedMemoryChannel
from megatron_tropd.weights.transport.message import Header, Kind, TransportError, disagreement
from megatron_tropd.weights.transport.p2p import P2PGroup, P2PTransfer
from megatron_tropd.weights.transport.staging import Staging, by_bucket

HELLO_TAG, ACKNOWLEDGE_TAG, OPEN_TAG = 1, 3, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """The report of one update on one rank."""

    version: int
    payload_bytes: int
    shared_bytes: int
    """Payload bytes that went through shared memory."""
    messages: int
    seconds: float
    staging_bytes: int
    """Memory held above the weights."""


class Endpoint:
    """Base class of sender and receiver: parameters, peers, groups.

    ``group`` carries payloads, on the device of the weights.  ``frames`` is a gloo group of the same ranks for hellos,
    acknowledgements and the headers of shared memory; None means ``group`` itself, which must then be gloo.
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
        self._data = self._control = P2PGroup(group, self._device, timeout_s)
        if frames is not None:
            self._control = P2PGroup(frames, torch.device("cpu"), timeout_s)
        self._channels: Mapping[int, Channel] = dict.fromkeys(peers, P2PChannel(self._data))

    def _open_pairs(self, begin: Callable[[Tensor, int, int, str], P2PTransfer]) -> None:
        """Make NCCL create the communicator of every pair, in the same order on all ranks.

        The first message of a pair creates it, in a call that waits for the other side.  If that happened in the
        order of buckets, ranks could deadlock.
        """
        if self._data.device.type == "cpu":
            return
        for peer in sorted(self._peers):
            if not self._channels[peer].shared:
                begin(self._data.empty(1), peer, OPEN_TAG, f"first message with {self._peers[peer]}").wait()

    def _share_with(self, peers: Iterable[int]) -> None:
        shared = SharedMemoryChannel(self._control)
        self._channels = {**self._channels, **dict.fromkeys(peers, shared)}

    @property
    def broken(self) -> str:
        """Why the groups cannot be used any more; empty while they can."""
        return self._control.broken or self._data.broken

    @property
    def staging_bytes(self) -> int:
        """Memory held above the weights, at most the plan's ``bucket_bytes``."""
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
        mine, p2p, names = self._header(Kind.HELLO, version), self._control, self._peers
        frame = p2p.frame(mine)
        answers = {peer: p2p.receive(p2p.empty(), peer, HELLO_TAG, f"hello with {names[peer]}") for peer in names}
        greetings = [p2p.send(frame, peer, HELLO_TAG, f"hello with {names[peer]}") for peer in names]
        for transfer in (*answers.values(), *greetings):
            transfer.wait()
        for peer, name in names.items():
            if wrong := disagreement(answers[peer].data, mine):
                raise TransportError(f"{name} and this rank do not agree on the update: {wrong}")


def extend_checksum(running: int, value: int) -> int:
    """Extend ``running``, a CRC-32 over a sequence of checksums, by the checksum ``value``."""
    return zlib.crc32(struct.pack("<I", value), running)


def take_next(halves: Iterator[Tensor], num_bytes: int) -> Tensor:
    """Return the next of ``halves``: an ``allocate`` for :class:`Staging` whose memory exists already."""
    return next(halves)
