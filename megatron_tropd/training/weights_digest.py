"""Digests that tell whether a student's weights, or its gradient, are those of an earlier launch, bit by bit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.training.student import Student
from megatron_tropd.weights.coordinates.parameters import local_parameters

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SLICE = 1 << 22
"""Elements that are widened to 64 bits at one time."""


def weights_digest(student: Student) -> str:
    """Return a digest of the weights of all ranks; another layout has another digest.  Collective over the world."""
    return _digest(local_parameters(student.model))


def gradient_digest(student: Student) -> str:
    """Return a digest of the finished gradient of all ranks, before clipping; another layout has another digest.
    Collective over the world."""
    parts = enumerate(student.gradient())
    return _digest({f"{number}.{place:06d}": part for number, of in parts for place, part in enumerate(of)})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of the bits of every rank's tensors.  Collective over the world.

    Against accident, not against an adversary: two sums over the bits of every tensor, one of them weighted by
    position, so that it costs two passes over the tensors on their own device and one copy to the host.
    """
    mine = sorted(tensors.items())
    digest = hashlib.sha256(repr([(name, tuple(tensor.shape)) for name, tensor in mine]).encode())
    if mine:
        digest.update(torch.stack([_sums(tensor) for _, tensor in mine]).cpu().numpy().tobytes())
    return hashlib.sha256("".join(gather_objects(digest.hexdigest())).encode()).hexdigest()


def _sums(tensor: Tensor) -> Tensor:
    """Return the two sums, int64 [2], modulo 2^64."""
    words = tensor.detach().contiguous().flatten().view(_WORDS[tensor.element_size()])
    positions = torch.arange(1, min(_SLICE, words.numel()) + 1, device=words.device)
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)
    for part in words.split(_SLICE):
        wide = part.long()
        sums = sums * 1_000_003 + torch.stack([wide.sum(), (wide * positions[: len(wide)]).sum()])
    return sums
