"""Row statistics and the in-place softmax gradient in Triton, the same functions as in ``ops/rows.py``, and the choice
among equal logits of ``ops/topk.py``.

The kernels read logits in their own dtype and compute in fp32 (never in bf16).  They use no atomics, and so give the
same bits in every run.  Block sizes are chosen by hand: a row of 19k to 152k logits is a few dozen blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8
_FLOOR = tl.constexpr(-1e4)  # as FLOOR in ops/rows.py


@triton.jit
def _partials_kernel(logits, out, stride, num_rows, width, BLOCK: tl.constexpr):
    """One program per row: reads the row once and rescales both sums whenever the maximum grows."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(base + column, mask=column < width, other=float("-inf")).to(tl.float32)
        # where(), not maximum(): a hardware maximum of NaN and a number may drop the NaN.
        top = tl.max(z, 0)
        larger = tl.where(top > maximum, top, maximum)
        safe = tl.where(larger == float("-inf"), 0.0, larger)
        delta = maximum - safe
        delta = tl.where(delta < _FLOOR, _FLOOR, delta)
        shrink = tl.exp(delta)
        shift = z - safe
        shift = tl.where(shift < _FLOOR, _FLOOR, shift)
        e = tl.exp(shift)
        moment = shrink * (moment + delta * total) + tl.sum(e * shift, 0)
        total = shrink * total + tl.sum(e, 0)
        maximum = larger
    tl.store(out + row, maximum)
    tl.store(out + num_rows + row, total)
    tl.store(out + 2 * num_rows + row, moment)


@triton.jit
def _gradient_kernel(
    logits, maxima, scales, slopes, offsets, stride, width, HAS_SLOPE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per row and block; every element is read and written by the same thread."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row.to(tl.int64) * stride + column
    inside = column < width
    shift = tl.load(place, mask=inside, other=0.0).to(tl.float32) - tl.load(maxima + row)
    shift = tl.where(shift < _FLOOR, _FLOOR, shift)
    factor = tl.load(scales + row)
    if HAS_SLOPE:
        factor = factor - tl.load(slopes + row) * (shift + tl.load(offsets + row))
    tl.store(place, (tl.exp(shift) * factor).to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _equals_kernel(logits, columns, lasts, aboves, stride, width, K: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row: reads it until the columns of enough logits that equal the k-th are found."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * stride
    out = columns + row.to(tl.int64) * K
    last = tl.load(lasts + row).to(tl.float32)
    above = tl.load(aboves + row).to(tl.int32)
    found = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    while (start < width) & (found < K - above):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(base + column, mask=column < width, other=float("nan")).to(tl.float32)
        equal = (z == last).to(tl.int32)
        place = above + found + tl.cumsum(equal, 0) - 1
        tl.store(out + place, column.to(tl.int64), mask=(equal == 1) & (place < K))
        found += tl.sum(equal, 0)
        start += BLOCK


def lowest_equals_(logits: Tensor, values: Tensor, columns: Tensor) -> None:
    """As ``ops.topk.lowest_equals_``, for rows of ``logits`` and ``columns`` that are contiguous, without a wait for
    the device."""
    rows, width = logits.shape
    lasts = values[:, -1].contiguous()
    aboves = (values != values[:, -1:]).sum(1)
    _equals_kernel[(rows,)](
        logits, columns, lasts, aboves, logits.stride(0), width, K=columns.shape[1], BLOCK=_BLOCK, num_warps=_WARPS
    )


def row_partials(logits: Tensor) -> Tensor:
    """As ``ops.rows.row_partials``, for rows that are contiguous."""
    rows, width = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    _partials_kernel[(rows,)](logits, out, logits.stride(0), rows, width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def softmax_gradient_(logits: Tensor, maximum: Tensor, scale: Tensor, slope: Tensor | None, offset: Tensor) -> None:
    """As ``ops.rows.softmax_gradient_``, for rows that are contiguous."""
    rows, width = logits.shape
    numbers = [value.contiguous() for value in (maximum, scale, scale if slope is None else slope, offset)]
    grid = (rows, triton.cdiv(width, _BLOCK))
    _gradient_kernel[grid](
        logits, *numbers, logits.stride(0), width, HAS_SLOPE=slope is not None, BLOCK=_BLOCK, num_warps=_WARPS
    )
