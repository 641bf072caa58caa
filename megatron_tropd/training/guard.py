"""No weight moves on a number that is not finite, and all ranks take the same branch."""

from __future__ import annotations

import math
from typing import Literal

EXIT_NONFINITE = 17


class NonFiniteStep(RuntimeError):
    """The loss or the gradient of a step is NaN or Inf; no weight was changed."""


def judge(
    *, step: int, loss: float, grad_norm: float, policy: Literal["stop", "skip"]
) -> Literal["stepped", "skipped"]:
    """Whether to update.  ``loss`` and ``grad_norm`` are global numbers, so every rank decides alike.

    Raises:
        NonFiniteStep: under ``stop``.
    """
    bad = [f"{name} is {value}" for name, value in (("loss", loss), ("gradient norm", grad_norm))
           if not math.isfinite(value)]  # fmt: skip
    if not bad:
        return "stepped"
    if policy == "skip":
        return "skipped"
    raise NonFiniteStep(
        f"step {step}: {' and '.join(bad)}; no weight was changed.  Resume from the last checkpoint with a lower "
        "--lr or --clip-grad, or pass --on-nonfinite skip"
    )
