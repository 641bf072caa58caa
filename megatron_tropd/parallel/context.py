"""Context parallelism: which tokens of packed sequences each rank of a context group holds.  No process group.

Every sequence is cut into 2 cp chunks of one size, and rank r holds chunks r and 2 cp - 1 - r, in this order.  Under a
causal mask the work of such a pair is the same for all ranks.  The order is that of Megatron-core and of Transformer
Engine, whose kernels compute positions and masks from it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sequence_multiple(cp: int) -> int:
    """Return the number of which the tokens of every sequence, padding included, are a multiple."""
    return 1 if cp == 1 else 2 * cp


def token_multiple(cp: int, tp: int) -> int:
    """Return the number of which the tokens of a micro-batch are a multiple: its padding is one more sequence, and
    sequence parallelism cuts the tokens of a context rank over ``tp``."""
    return math.lcm(sequence_multiple(cp), cp * tp)


def held_tokens(bounds: Tensor, num_tokens: int, *, cp: int, rank: int) -> Tensor:
    """Return the packed positions that context rank ``rank`` holds, ascending, without a wait for the device.

    Args:
        bounds: [num_sequences + 1] where the sequences begin; all are multiples of :func:`sequence_multiple`.
        num_tokens: T, the last of the bounds.
        cp: ranks of the context group.
        rank: number of one of them.

    Returns:
        [T / cp] int64.

    Example:
        >>> [held_tokens(torch.tensor([0, 8, 12]), 12, cp=2, rank=rank).tolist() for rank in (0, 1)]
        [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    """
    starts = bounds.long()
    mine = starts // cp
    token = torch.arange(num_tokens // cp, device=bounds.device)
    sequence = torch.searchsorted(mine[1:].contiguous(), token, right=True)
    offset, chunk = token - mine[sequence], (mine[sequence + 1] - mine[sequence]) // 2
    place = torch.where(offset < chunk, rank * chunk, (2 * cp - 2 - rank) * chunk) + offset
    return starts[sequence] + place


def packed_order(bounds: Tensor, num_tokens: int, *, cp: int) -> Tensor:
    """Return the index [T] that puts tokens gathered from all ranks, in the order of their ranks, into packed order."""
    return torch.cat([held_tokens(bounds, num_tokens, cp=cp, rank=rank) for rank in range(cp)]).argsort()
