"""Statistics of rows of logits and the gradient of a row, in PyTorch, a block of rows at a time.

A block fits a cache, so the passes over a row cost little compared with the matrix products, and fp32 copies of bf16
logits exist for one block only.  On a GPU ``kernels/triton_rows.py`` replaces :func:`row_partials` and
:func:`softmax_gradient_`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_tropd.ops import kernels

FLOOR = -1e4
"""Replaces -inf in a shifted logit: exp(FLOOR) and exp(FLOOR) * FLOOR are 0, whereas 0 * -inf would be NaN."""

_BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


def row_blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows of a tensor [C, v]; the elements of each slice fit the device's block."""
    size = max(1, _BLOCK_ELEMENTS[rows.device.type] // max(rows.shape[1], 1))
    for start in range(0, len(rows), size):
        yield slice(start, min(start + size, len(rows)))


def shifted(block: Tensor, maximum: Tensor) -> Tensor:
    """fp32 block - maximum[:, None], a new tensor, with -inf replaced by :data:`FLOOR`; NaN stays."""
    return (block.float() - maximum[:, None]).clamp_(min=FLOOR)


def row_partials(logits: Tensor) -> Tensor:
    """This rank's share of every row of ``logits`` [C, v], fp32 [3, C]: maximum m, sum exp(z - m), sum
    exp(z - m) (z - m).  An empty row, or one of -inf alone, gives (-inf, 0, 0); NaN gives NaN."""
    if kernels.use_triton(logits):
        return kernels.load().row_partials(logits)
    out = torch.zeros(3, len(logits), dtype=torch.float32, device=logits.device)
    out[0] = -torch.inf
    if logits.shape[1] == 0:
        return out
    for rows in row_blocks(logits):
        block = logits[rows]
        maximum = block.amax(1).float()
        out[0, rows] = maximum
        shift = shifted(block, finite(maximum))
        exponentials = shift.exp()
        out[1, rows] = exponentials.sum(1)
        out[2, rows] = torch.linalg.vecdot(exponentials, shift)
    return out


def finite(maximum: Tensor) -> Tensor:
    """``maximum`` with 0 in place of -inf, so that -inf - maximum is -inf and not NaN."""
    return torch.where(maximum == -torch.inf, 0.0, maximum)


def rescale(partials: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums of ``partials`` as if they had been made with ``maximum`` [C] (the group's)."""
    delta = (partials[0] - finite(maximum)).clamp(min=FLOOR)
    factor = delta.exp()
    return factor * partials[1], factor * (partials[2] + delta * partials[1])


def softmax_gradient_(logits: Tensor, maximum: Tensor, scale: Tensor, slope: Tensor | None, offset: Tensor) -> None:
    """In place: row z becomes e (scale - slope (z - maximum + offset)) with e = exp(z - maximum).

    ``maximum``, ``scale``, ``slope``, ``offset`` are fp32 [C]; without ``slope`` the row becomes e scale.
    """
    if kernels.use_triton(logits):
        kernels.load().softmax_gradient_(logits, maximum, scale, slope, offset)
        return
    for rows in row_blocks(logits):
        block = logits[rows]
        if slope is None and block.dtype == torch.float32:
            block.sub_(maximum[rows, None]).exp_().mul_(scale[rows, None])
        else:
            part = None if slope is None else slope[rows]
            block.copy_(softmax_term(shifted(block, maximum[rows]), scale[rows], part, offset[rows]))


def softmax_term(shift: Tensor, scale: Tensor, slope: Tensor | None, offset: Tensor) -> Tensor:
    """exp(shift) (scale - slope (shift + offset)) for shifted logits [C, n]."""
    exponentials = shift.exp()
    if slope is None:
        return exponentials.mul_(scale[:, None])
    weight = (shift + offset[:, None]).mul_(-slope[:, None]).add_(scale[:, None])
    return exponentials.mul_(weight)


def compact_(rows: Tensor, index: Tensor) -> Tensor:
    """Move the rows at ascending ``index`` [n] to the front, in place; returns the first n rows."""
    size = max(1, _BLOCK_ELEMENTS[rows.device.type] // max(rows.shape[1], 1))
    for start in range(0, len(index), size):  # index[i] >= i: a row is read before it is overwritten
        part = index[start : start + size]
        rows[start : start + len(part)] = rows.index_select(0, part)
    return rows[: len(index)]
