"""The header of 64 bytes before every message, its checksum, and the name of a message in errors."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from megatron_tropd.weights.plan.bucketing import HEADER_BYTES
from megatron_tropd.weights.plan.types import Message

_FORMAT = struct.Struct("<6s2sqiIq32s")
assert _FORMAT.size == HEADER_BYTES
_MAGIC = b"TROPD1"
_SUM_CHUNK = 1 << 22


class TransportError(RuntimeError):
    """An update did not arrive; the message names the tensors, the engine and the rank."""


class Kind(Enum):
    """Kind of a message: the first of two letters in its header.  The second is its checksum: c CRC-32, s a GPU sum."""

    HELLO = b"H"
    DATA = b"D"
    TAKEN = b"T"
    ACKNOWLEDGED = b"A"
    REFUSED = b"R"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first 64 bytes of a message."""

    kind: Kind
    version: int
    bucket: int = 0
    checksum: int = 0
    """Checksum of the payload; in an acknowledgement, of the checksums of all messages that arrived."""
    payload_bytes: int = 0
    digest: str
    """Digest of the plan."""
    on_gpu: bool = False
    """Whether the checksum is the weighted sum computed on a GPU, not the CRC-32 of host memory."""

    def pack(self) -> bytes:
        """Return the header as bytes."""
        kind = self.kind.value + (b"s" if self.on_gpu else b"c")
        digest = bytes.fromhex(self.digest)
        return _FORMAT.pack(_MAGIC, kind, self.version, self.bucket, self.checksum, self.payload_bytes, digest)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        """Read a header from its bytes.

        Raises:
            ValueError: not a header of this format.
        """
        magic, kind, version, bucket, checksum, payload_bytes, digest = _FORMAT.unpack(data)
        if magic != _MAGIC or kind[1:] not in (b"c", b"s"):
            raise ValueError(f"no header of this format: it begins with {data[:8]!r}")
        return cls(
            kind=Kind(kind[:1]), version=version, bucket=bucket, checksum=checksum, payload_bytes=payload_bytes,
            digest=digest.hex(), on_gpu=kind[1:] == b"s",
        )  # fmt: skip


def difference(got: Header, expected: Header) -> str:
    """Return the first field of a header that is not as expected; empty if all fields are."""
    names = ("kind", "version", "bucket", "payload_bytes", "digest", "on_gpu", "checksum")
    for name in names:
        a, b = getattr(got, name), getattr(expected, name)
        if a != b:
            return f"{name.replace('_', ' ')} {getattr(a, 'name', a)} instead of {getattr(b, 'name', b)}"
    return ""


def disagreement(frame: Tensor, expected: Header) -> str:
    """Return how the header at the beginning of ``frame`` [uint8] is not as expected; empty if it is."""
    try:
        return difference(Header.unpack(bytes(frame[:HEADER_BYTES].tolist())), expected)
    except ValueError as error:
        return str(error)


def checksum(data: Tensor) -> int:
    """Return 32 bits that change with any one byte of ``data`` [uint8].

    In host memory CRC-32; on a GPU the sum of bytes times odd weights, modulo 2**32.
    """
    if data.device.type == "cpu":
        return zlib.crc32(data.numpy().data)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, data.numel(), _SUM_CHUNK):
        part = data[start : start + _SUM_CHUNK].to(torch.int64)
        weight = torch.arange(start, start + part.numel(), device=data.device) * 2 + 1  # odd: each byte changes the sum
        total += (part * weight).sum()  # wraps at 2**64, a multiple of the modulus
    return int(total) & 0xFFFFFFFF


def message_name(message: Message) -> str:
    """Return the name of a message in errors: its tensors, ranks and bucket."""
    first, last = message.copies[0].hf_name, message.copies[-1].hf_name
    tensors = first if first == last else f"{first} to {last}"
    return (
        f"bucket {message.bucket} ({tensors}) from trainer rank {message.source} to engine {message.engine} "
        f"rank {message.engine_rank}"
    )
