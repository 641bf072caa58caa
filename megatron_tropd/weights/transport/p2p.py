"""Sends and receives of one rank over a group, each with a timeout and an error that names what failed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.weights.plan.bucketing import HEADER_BYTES
from megatron_tropd.weights.transport.message import Header, TransportError

POLL_S = 0.001


@dataclass(frozen=True, slots=True, kw_only=True)
class P2PTransfer:
    """A send or a receive that has begun; its memory must stay until :meth:`wait` returns."""

    p2p: P2PGroup
    work: Any
    data: Tensor
    what: str

    def wait(self) -> None:
        """Wait until the transfer is done on this rank's device.

        Raises:
            TransportError: the peer is gone, or the timeout has passed.
        """
        self.p2p.wait(self)


class P2PGroup:
    """Point-to-point messages over one group, whose tensors are on one device."""

    def __init__(self, group: Any, device: torch.device, timeout_s: float) -> None:
        self._group, self._timeout_s = group, timeout_s
        self.device = device
        self.broken = ""
        """Why the group cannot be used any more; empty while it can."""

    def empty(self, num_bytes: int = HEADER_BYTES) -> Tensor:
        """Return memory for a message [uint8]."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def frame(self, header: Header) -> Tensor:
        """Return a header as a message [uint8]."""
        return torch.frombuffer(bytearray(header.pack()), dtype=torch.uint8).to(self.device)

    def send(self, data: Tensor, peer: int, tag: int, what: str) -> P2PTransfer:
        """Begin to send; ``what`` names the message in errors."""
        return self._start(self._group.send, data, peer, tag, what)

    def receive(self, data: Tensor, peer: int, tag: int, what: str) -> P2PTransfer:
        """Begin to receive; ``what`` names the message in errors."""
        return self._start(self._group.recv, data, peer, tag, what)

    def _start(self, call: Any, data: Tensor, peer: int, tag: int, what: str) -> P2PTransfer:
        try:
            return P2PTransfer(p2p=self, work=call([data], peer, tag), data=data, what=what)
        except RuntimeError as error:
            raise self.lost(what, error) from error

    def wait(self, transfer: P2PTransfer) -> None:
        """Wait for a transfer; see :meth:`P2PTransfer.wait`."""
        try:
            if self.device.type == "cpu":
                transfer.work.wait(timedelta(seconds=self._timeout_s))
                return
            deadline = time.monotonic() + self._timeout_s
            while not transfer.work.is_completed():
                if time.monotonic() > deadline:
                    raise RuntimeError("timed out")
                time.sleep(POLL_S)
            transfer.work.wait()
        except RuntimeError as error:
            raise self.lost(transfer.what, error) from error

    def lost(self, what: str, error: object) -> TransportError:
        """Mark the group as unusable and return the error to raise."""
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        self.broken = f"{what} failed: {reason}"
        return TransportError(
            f"{self.broken} (each wait may take {self._timeout_s:g} s); make a new group and push again"
        )
