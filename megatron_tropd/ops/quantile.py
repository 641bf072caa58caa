"""An exact quantile of numbers that are spread over ranks."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_DIGIT_BITS = 8
_DIGITS = 32 // _DIGIT_BITS


def quantile_threshold(values: Tensor, share: float, *, group: Any = None) -> float:
    """The threshold for which ``value >= threshold`` selects the top ``share`` of all ranks' ``values`` (fp32, any
    number on each rank, each value on one rank only).

    With n values in all, the threshold is the m-th greatest, m = ceil(share n): at least the share is selected, and
    more where other values equal the threshold.  The threshold depends only on the values, not on the rank that holds
    them; it is inf without values, and NaN counts as greater than everything.  Collective over ``group``: four SUMs of
    256 integers.

    Raises:
        ValueError: ``share`` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share {share}: must be above 0 and at most 1")
    keys = _keys(values)
    prefix, remaining = 0, 0
    for digit in range(_DIGITS):  # from the most significant: a histogram says which bin holds the m-th greatest
        shift = 32 - _DIGIT_BITS * (digit + 1)
        inside = keys[(keys >> (shift + _DIGIT_BITS)) == prefix]
        counts = torch.bincount((inside >> shift) & (2**_DIGIT_BITS - 1), minlength=2**_DIGIT_BITS)
        dist.all_reduce(counts, group=group)
        histogram = counts.tolist()
        if digit == 0:
            total = sum(histogram)
            if total == 0:
                return math.inf
            remaining = math.ceil(Fraction(str(share)) * total)  # str: 0.2 is meant to be one fifth
        bucket = 2**_DIGIT_BITS - 1
        while histogram[bucket] < remaining:
            remaining -= histogram[bucket]
            bucket -= 1
        prefix = (prefix << _DIGIT_BITS) + bucket
    return _value(prefix)


def _keys(values: Tensor) -> Tensor:
    """int64 in [0, 2^32) that sort as fp32 ``values`` do; -0.0 equals 0.0."""
    bits = (values.detach().float().flatten() + 0.0).contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + 2**31


def _value(key: int) -> float:
    ordered = key - 2**31
    bits = ordered if ordered >= 0 else (-1 - ordered) - 2**31
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
