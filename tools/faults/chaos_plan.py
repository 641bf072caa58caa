"""Which faults a chaos run has, and at which steps: drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Literal

SIZE = 2
"""Ranks of the job."""
PHASES = ("generate", "score", "train")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A fault of the matrix after which the same command goes on."""

    name: str
    row: int
    """Of the matrix (``tools/faults/matrix.py``)."""
    what: str
    where: Literal["outside", "step", "save"]
    """``outside``: a signal or a file, in a phase of the step; ``step``: inside a rank, in the update of the step;
    ``save``: inside a rank, in the first save after the step or a later one."""
    says: str
    """What the job must print; "" for nothing in particular."""
    ranks: tuple[int, ...] = (0, 1)
    """Ranks that it may hit."""
    goes_on: bool = False
    """Whether the job goes on by itself, without being started again."""
    damages: bool = False
    """Whether the newest checkpoint is damaged afterwards."""


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="kill-rank", row=1, what="SIGKILL for rank {rank}, in {phase}", where="outside", says="The job ends"),
        Kind(name="kill-job", row=1, what="SIGKILL for torchrun and all ranks, in {phase}", where="outside", says=""),
        Kind(
            name="kill-in-save", row=2, what="SIGKILL for rank {rank} while it writes a checkpoint", where="save",
            says="The job ends",
        ),
        Kind(
            name="kill-before-tracker", row=3, what="SIGKILL for rank 0 between rename and tracker", where="save",
            says="The job ends", ranks=(0,),
        ),
        Kind(
            name="sigterm-job", row=4, what="SIGTERM for torchrun, in {phase}", where="outside",
            says="Stopped by SIGTERM",
        ),
        Kind(
            name="sigterm-rank", row=4, what="SIGTERM for rank {rank}, in {phase}", where="outside",
            says="Stopped by SIGTERM",
        ),
        Kind(
            name="sigusr1-rank", row=4, what="SIGUSR1 for rank {rank}, in {phase}", where="outside",
            says="Stopped by SIGUSR1",
        ),
        Kind(name="stop-file", row=4, what="the stop file, in {phase}", where="outside", says="Stopped by the file"),
        Kind(
            name="sigstop-rank", row=5, what="SIGSTOP for rank {rank}, in {phase}", where="outside",
            says="Hang: rank {rank} no longer answers",
        ),
        Kind(
            name="full-disk", row=6, what="full disk of rank {rank} while it writes a checkpoint", where="save",
            says="cannot write", ranks=(1,),
        ),
        Kind(
            name="flipped-bit", row=7, what="SIGKILL for all in {phase}, then a bit of the newest checkpoint flipped",
            where="outside", says="", damages=True,
        ),
        Kind(
            name="truncated-file", row=8, what="SIGKILL for all in {phase}, then a file of the newest checkpoint cut",
            where="outside", says="", damages=True,
        ),
        Kind(
            name="nan-always", row=11, what="NaN in the gradient of rank {rank}, in both passes", where="step",
            says="gradient norm is nan; computed again",
        ),
        Kind(
            name="nan-once", row=13, what="NaN in the gradient of rank {rank}, once", where="step",
            says="transient error", goes_on=True,
        ),
        Kind(
            name="flip-once", row=13, what="a bit of the gradient of rank {rank} flips, once", where="step",
            says="transient error", goes_on=True,
        ),
        Kind(
            name="large-always", row=14, what="gradient of rank {rank} 1e10 times too large, in both passes",
            where="step", says="beyond --spike-grad-norm",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault of a plan."""

    index: int
    step: int
    """Where it happens; of a fault in a save, the first step after which it can."""
    kind: str
    rank: int
    phase: str
    """In which a fault from outside is tried to happen."""

    @property
    def of(self) -> Kind:
        """Its kind."""
        return KINDS[self.kind]

    @property
    def what(self) -> str:
        """What happens, for people."""
        return self.of.what.format(rank=self.rank, phase=self.phase)

    @property
    def says(self) -> str:
        """What the job must print."""
        return self.of.says.format(rank=self.rank)

    def plain(self) -> dict[str, Any]:
        """Return the fault for JSON."""
        return asdict(self)


def draw(
    seed: int, *, steps: int, every: int, save_interval: int, kinds: Collection[str] = tuple(KINDS)
) -> list[Fault]:
    """Draw one fault for every ``every`` steps.  A kind comes again only when all have come that were possible.

    A fault's step is in the first half of its steps, so that one in a save comes before the next fault.
    """
    random_numbers, left = random.Random(seed), list[str]()
    plan: list[Fault] = []
    for first in range(0, steps - every + 1, every):
        step = first + random_numbers.randint(1, max(every - save_interval, 1))
        possible = [name for name in left if _is_possible(KINDS[name], step, save_interval)]
        if not possible:
            left = sorted(kinds)
            possible = [name for name in left if _is_possible(KINDS[name], step, save_interval)]
        name = random_numbers.choice(possible)
        left.remove(name)
        rank, phase = random_numbers.choice(KINDS[name].ranks), random_numbers.choice(PHASES)
        plan.append(Fault(index=len(plan), step=step, kind=name, rank=rank, phase=phase))
    return plan


def _is_possible(kind: Kind, step: int, save_interval: int) -> bool:
    """Without an earlier checkpoint there is nothing to fall back to: the run refuses to go on."""
    return not kind.damages or step > 2 * save_interval
