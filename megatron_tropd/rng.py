"""Counter-based random numbers: each number is a pure function of its key.

The key is (seed, stream, step, sample uid, position).  A number is therefore the same for every TP, PP and
DP layout and micro-batch size, and after a resume; checkpoints need no generator state.  The mixer is
SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Stream(IntEnum):
    """What a random number is used for.  Streams never share a number."""

    GATE = 1
    SAMPLING = 2
    SHUFFLE = 3
    GUIDANCE = 4
    EVALUATION = 5
    MEASURED = 6


_SAMPLE_BITS = 20


def sample_uid(prompt_uid: int, sample_index: int) -> int:
    """Return one integer that identifies a sample of a prompt; at most 2**20 samples per prompt."""
    if not 0 <= sample_index < 1 << _SAMPLE_BITS:
        raise ValueError(f"sample_index {sample_index} is not in [0, 2**{_SAMPLE_BITS})")
    return (prompt_uid << _SAMPLE_BITS) | sample_index


def split_sample_uid(uid: int) -> tuple[int, int]:
    """Return (prompt uid, sample index); inverse of :func:`sample_uid`."""
    return uid >> _SAMPLE_BITS, uid & (1 << _SAMPLE_BITS) - 1


def _mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK64
    return x ^ (x >> 31)


def key(seed: int, stream: Stream, step: int) -> int:
    """Return the 64-bit key of one stream of one step."""
    state = seed & _MASK64
    for word in (int(stream), step):
        state = _mix((state + _GOLDEN * (word + 1)) & _MASK64)
    return state


def _signed(x: int) -> int:
    """Return the int64 with the same bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift int64 bit patterns logically (torch has only the arithmetic shift)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def uniform(stream_key: int, sample_uids: Tensor, positions: Tensor) -> Tensor:
    """Return uniform numbers in (0, 1), float64, one per (sample uid, position).

    ``sample_uids`` and ``positions`` are int64 and broadcast against each other.  Integer
    arithmetic wraps, so the bits are the same on every device.
    """
    golden = _signed(_GOLDEN)
    state = _mix_tensor((sample_uids.long() + 1) * golden + _signed(stream_key))
    state = _mix_tensor((positions.long() + 1) * golden + state)
    return (_shift_right(state, 11).double() + 0.5) * 2.0**-53


def permutation(stream_key: int, n: int) -> Tensor:
    """Return a random permutation of range(n) [n] int64, the same on every machine."""
    index = torch.arange(n, dtype=torch.int64)
    draws = uniform(stream_key, index, torch.zeros_like(index))
    return torch.argsort(draws, stable=True)
