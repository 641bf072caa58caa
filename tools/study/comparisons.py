"""Looks up what the results say: of one method, and of one method against another."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tools.study.plan import LR, STEPS
from tools.study.results import DECODINGS, Result
from tools.study.statistics import Difference, Mean, difference_of, mean_of

STUDENT = "student"
"""Stands for the student before the run, where a method is expected."""
ENTROPY, GRAD_NORM, TRUST_FIRST, TRUST_LAST = "entropy", "grad_norm", "trust_first", "trust_last"
QUANTITIES = (*DECODINGS, ENTROPY, GRAD_NORM, TRUST_FIRST, TRUST_LAST)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Condition:
    """What runs that are compared have in common."""

    world: str
    lr: float = LR
    steps: int = STEPS


class Table:
    """All results, by condition, method and seed."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._results: dict[tuple[Condition, str], dict[int, Result]] = {}
        for result in results:
            condition = Condition(world=result.world, lr=result.lr, steps=result.steps)
            self._results.setdefault((condition, result.method), {})[result.seed] = result

    def runs(self, condition: Condition, method: str) -> list[Result]:
        """Its runs, in the order of their seeds."""
        return [run for _, run in sorted(self._results.get((condition, method), {}).items())]

    def values(self, condition: Condition, method: str, quantity: str) -> dict[int, float]:
        """Seed -> value, in the order of the seeds; accuracies in percent.

        The student's accuracy is read from any run of the condition: every run begins with the same student.
        """
        if method == STUDENT:
            before: dict[int, float] = {}
            for (of, _), runs in self._results.items():
                if of.world == condition.world:
                    before |= {seed: 100 * run.before[quantity] for seed, run in runs.items()}
            return dict(sorted(before.items()))
        return {run.seed: _value(run, quantity) for run in self.runs(condition, method)}

    def mean(self, condition: Condition, method: str, quantity: str) -> Mean | None:
        """Mean over seeds; None where there is no run."""
        values = self.values(condition, method, quantity)
        return mean_of(list(values.values())) if values else None

    def difference(self, condition: Condition, first: str, second: str, quantity: str) -> Difference | None:
        """First less second over the seeds that both have; None where there are none."""
        ours, theirs = (self.values(condition, method, quantity) for method in (first, second))
        pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
        return difference_of(pairs) if pairs else None


def _value(run: Result, quantity: str) -> float:
    if quantity in DECODINGS:
        return 100 * run.after[quantity]
    if quantity == ENTROPY:
        return run.entropy[-1]
    if quantity == GRAD_NORM:
        return math.fsum(run.grad_norm) / len(run.grad_norm)
    return run.trusted[0 if quantity == TRUST_FIRST else 1]
