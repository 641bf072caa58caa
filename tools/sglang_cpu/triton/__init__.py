"""Stand-in for triton.  Two pure functions are real, because SGLang computes sizes with them."""

import sys
from typing import Any

from sglang_cpu_inert import install

install(__name__, "3.6.0")
sys.modules[f"{__name__}.knobs"] = None  # not importable: SGLang registers hooks there if it can


def cdiv(numerator: int, denominator: int) -> int:
    """Quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """Smallest power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


class Config:
    """An argument of ``@autotune``, made at import time and never read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass
