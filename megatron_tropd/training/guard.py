"""No weight moves on a number that is not finite, and all ranks take the same branch."""

from __future__ import annotations

import math
from typing import Literal

EXIT_NONFINITE = 17


class NonFiniteStep(RuntimeError):
    """The loss or the gradient of a step is NaN or Inf; no weight was changed."""


MAX_SKIPS_IN_A_ROW = 10


class Guard:
    """Decides whether a step may move the weights.

    Loss and gradient norm are global numbers, so every rank decides alike without talking.
    """

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self._policy = policy
        self._skipped = 0

    def judge(self, *, step: int, loss: float, grad_norm: float) -> Literal["stepped", "skipped"]:
        """Whether to update.

        Raises:
            NonFiniteStep: under ``stop``, or after too many skips in a row.
        """
        numbers = {"loss": loss, "gradient norm": grad_norm}
        bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        if not bad:
            self._skipped = 0
            return "stepped"
        self._skipped += 1
        if self._policy == "skip" and self._skipped <= MAX_SKIPS_IN_A_ROW:
            return "skipped"
        if self._policy == "skip":
            advice = f"that was step {self._skipped} in a row"
        else:
            advice = "resume from the last checkpoint with a lower --lr or --clip-grad, or pass --on-nonfinite skip"
        raise NonFiniteStep(f"step {step}: {' and '.join(bad)}; no weight was changed; {advice}")
