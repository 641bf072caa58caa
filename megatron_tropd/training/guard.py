"""Stop or skip an update whose loss or gradient norm is not finite, with the same decision on every rank."""

from __future__ import annotations

import math
from typing import Literal


class NonFiniteStep(RuntimeError):
    """The loss or the gradient norm of an update is NaN or Inf; that update changed no weight."""

    exit_code = 17


MAX_SKIPS_IN_A_ROW = 10


class Guard:
    """Decides whether an update may change the weights.

    Loss and gradient norm are global, so all ranks decide alike without communication.
    """

    def __init__(self, policy: Literal["stop", "skip"]) -> None:
        self._policy = policy
        self._skipped = 0

    def judge(self, *, step: int, loss: float, grad_norm: float) -> Literal["stepped", "skipped"]:
        """Return ``stepped`` to make the update, ``skipped`` to leave it out.

        Raises:
            NonFiniteStep: a number is not finite, and the policy is ``stop`` or MAX_SKIPS_IN_A_ROW skips came before.
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
