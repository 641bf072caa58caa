"""Parts of an answer, checked one at a time: each function returns the part or raises BadResponse.  Pure.

JSON has no types that Python would check: ``true`` would pass for the number 1, and ``7.0`` for the id 7.
"""

from __future__ import annotations

import math
from typing import Any

from megatron_tropd.json_files import shown
from megatron_tropd.sglang.errors import BadResponse

ROUNDING = 1e-3
"""A log-probability may be above 0 by so much, and then counts as 0: the server takes the logarithm of a softmax in
fp32, with an error of 1e-7 of the logits, so that 1e-3 would need logits of 10,000."""
_MAX_FP32 = 3.4e38


def field(value: Any, *path: str) -> Any:
    """Return the value at ``path`` in nested objects."""
    for name in path:
        if not isinstance(value, dict) or name not in value:
            raise BadResponse(f"the answer has no {'.'.join(path)}: {shown(value)}")
        value = value[name]
    return value


def integer(value: Any, what: str, *, low: int, high: int) -> int:
    """Return ``value`` if it is an integer in [low, high]."""
    if type(value) is not int or not low <= value <= high:
        raise BadResponse(f"{what} is {shown(value)}; expected an integer from {low} to {high}")
    return value


def number(value: Any, what: str) -> float:
    """Return ``value`` as a float if it is a finite number."""
    if type(value) is float and math.isfinite(value):
        return value
    if type(value) is int and abs(value) < 1 << 53:  # a larger one would lose digits
        return float(value)
    raise BadResponse(f"{what} is {shown(value)}; expected a finite number")


def logprob(value: Any, what: str) -> float:
    """Return ``value`` if it is a log-probability: finite in fp32 too, and 0 or less, after rounding."""
    found = number(value, what)
    if not -_MAX_FP32 <= found <= ROUNDING:
        raise BadResponse(f"{what} is {found!r}; expected a log-probability: a finite number not above 0")
    return min(found, 0.0)


def text(value: Any, what: str) -> str:
    """Return ``value`` if it is a string."""
    if not isinstance(value, str):
        raise BadResponse(f"{what} is {shown(value)}; expected a string")
    return value


def items(value: Any, what: str) -> list[Any]:
    """Return ``value`` if it is a list."""
    if not isinstance(value, list):
        raise BadResponse(f"{what} is {shown(value)}; expected a list")
    return value
