"""Whether programs that a model wrote can be run here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tropd.doctor.finding import Finding, Subject
from megatron_tropd.sandbox import check

SUBJECT = Subject(title="Sandbox")


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxFacts:
    """What the sandbox cannot enforce here; None if it was not asked."""

    missing: tuple[str, ...] | None = None
    failed: tuple[Finding, ...] = ()


def probe() -> SandboxFacts:
    """Run a program that tries what it must not."""
    return SandboxFacts(missing=tuple(check()))


def judge(facts: SandboxFacts) -> Iterator[Finding]:
    """Return what ``facts`` mean for a run."""
    yield from facts.failed
    if facts.missing:
        advice = "Rewards and benchmarks that run a model's code refuse to; all else works (docs/sandbox.md)."
        yield SUBJECT.note("generated code", " ".join(facts.missing), advice)
    elif facts.missing is not None:
        yield SUBJECT.ok("generated code", "confined: time, memory, processes, files, network")
