"""Every method by name: one row each.  Adding a method is adding a row (and a file, if its parts are
not here yet)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_tropd.objectives.base import FklSupport, Objective
from megatron_tropd.objectives.gates import GateKind
from megatron_tropd.objectives.trust_region import TrustRegion


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveSettings:
    """The numbers a user may set; each method reads those it has."""

    top_k: int = 64
    gate: GateKind = "bernoulli"
    fkl_support: FklSupport = "raw"
    outlier_coef: float = 1.0
    outlier_threshold: float = -2.0
    guidance_beta: float = 0.001


def _opd(s: ObjectiveSettings) -> Objective:
    """K1 reverse KL on every student token (Thinking Machines' OPD; TrOPD Eq. 2)."""
    return TrustRegion(gate="none", outlier="none", guidance_beta=s.guidance_beta, tau=s.outlier_threshold)


def _tropd(s: ObjectiveSettings) -> Objective:
    """K1 where the teacher would have accepted the token, top-k forward KL where not (TrOPD Eq. 9)."""
    return TrustRegion(
        gate=s.gate,
        outlier="forward_kl",
        top_k=s.top_k,
        outlier_coef=s.outlier_coef,
        fkl_support=s.fkl_support,
        guidance_beta=s.guidance_beta,
        tau=s.outlier_threshold,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of the table."""

    make: Callable[[ObjectiveSettings], Objective]
    guided: bool
    """Whether the paper's recipe starts the student from teacher prefixes."""


METHODS: dict[str, Method] = {
    "opd": Method(make=_opd, guided=False),
    "tropd": Method(make=_tropd, guided=True),
}


def is_guided(name: str) -> bool:
    """Whether ``name`` uses teacher prefixes unless told otherwise."""
    return name in METHODS and METHODS[name].guided


def make_objective(name: str, settings: ObjectiveSettings) -> Objective:
    """The objective called ``name``.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(f"--objective {name!r} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name].make(settings)
