"""A digest that tells whether a student's weights are those of an earlier launch, bit by bit."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.training.student import Student
from megatron_tropd.weights.coordinates.parameters import local_parameters

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SLICE = 1 << 22
"""Elements that are widened to 64 bits at one time."""


def weights_digest(student: Student) -> str:
    """Return a digest of the weights of all ranks; another layout has another digest.  Collective over the world.

    Against accident, not against an adversary: two sums over the bits of every parameter, one of them weighted by
    position, so that it costs two passes over the weights on their own device and one copy to the host.
    """
    parameters = sorted(local_parameters(student.model).items())
    mine = hashlib.sha256(repr([(name, tuple(tensor.shape)) for name, tensor in parameters]).encode())
    if parameters:
        mine.update(torch.stack([_sums(tensor) for _, tensor in parameters]).cpu().numpy().tobytes())
    return hashlib.sha256("".join(gather_objects(mine.hexdigest())).encode()).hexdigest()


def _sums(parameter: Tensor) -> Tensor:
    """Return the two sums, int64 [2], modulo 2^64."""
    words = parameter.detach().contiguous().flatten().view(_WORDS[parameter.element_size()])
    positions = torch.arange(1, min(_SLICE, words.numel()) + 1, device=words.device)
    sums = torch.zeros(2, dtype=torch.int64, device=words.device)
    for part in words.split(_SLICE):
        wide = part.long()
        sums = sums * 1_000_003 + torch.stack([wide.sum(), (wide * positions[: len(wide)]).sum()])
    return sums
