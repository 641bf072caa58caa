"""SGLang's environment: the interpreter that a run starts its servers with."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.doctor import child
from megatron_tropd.doctor.finding import Finding, Subject
from megatron_tropd.doctor.versions import SGLANG

SUBJECT = Subject(title="SGLang")
_DEADLINE_S = 30.0
_INSTALL = f"pip install sglang=={SGLANG} in an environment of its own (without a GPU: make sglang-env)"

_ASK = """
import importlib.metadata, json
for name in ("sglang", "torch"):
    try:
        print(json.dumps({name: importlib.metadata.version(name)}))
    except importlib.metadata.PackageNotFoundError:
        pass
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangFacts:
    """Facts about the environment of the servers."""

    python: str = ""
    given: bool = False
    """Whether --sglang-python names it; otherwise it is this interpreter, as for a run without the flag."""
    end: str = ""
    """What went wrong when it was asked; empty if nothing."""
    sglang: str | None = None
    torch: str | None = None
    failed: tuple[Finding, ...] = ()


def probe(python: str) -> SGLangFacts:
    """Read the facts of the interpreter at ``python``; empty: this one."""
    path = str(Path(python or sys.executable).absolute())
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}  # as for a server
    output = child.run([path, "-P", "-c", _ASK], deadline_s=_DEADLINE_S, environ=environ)
    said = output.answers()
    return SGLangFacts(
        python=path, given=bool(python), end=output.end, sglang=said.get("sglang"), torch=said.get("torch")
    )


def judge(facts: SGLangFacts, *, torch: str) -> Iterator[Finding]:
    """Return what ``facts`` mean for a run whose trainer has this version of torch."""
    yield from facts.failed
    if not facts.python:
        return
    if facts.end and facts.given:
        advice = (
            f"A run with this --sglang-python could not start a server.  Name the Python that has SGLang: {_INSTALL}"
        )
        yield SUBJECT.problem("interpreter", f"{facts.python}: {facts.end}", advice)
    elif not facts.sglang and facts.given:
        advice = f"A run with this --sglang-python could not start a server: {_INSTALL}"
        yield SUBJECT.problem("sglang", f"not installed in the environment of {facts.python}", advice)
    elif not facts.sglang:
        advice = (
            "Rollouts come from the embedded engine, which writes one token at a time; --rollout-engine sglang needs "
            f"servers.  {_INSTALL}, then name its Python with --sglang-python, here too."
        )
        yield SUBJECT.note("sglang", "not in this environment, and no --sglang-python is given", advice)
    else:
        yield from _versions(facts, torch)


def _versions(facts: SGLangFacts, torch: str) -> Iterator[Finding]:
    found = f"{facts.sglang} of {facts.python}"
    if facts.sglang != SGLANG:
        advice = (
            f"The tests run with {SGLANG}; in another version the endpoints for weights may differ.  "
            f"pip install sglang=={SGLANG} there"
        )
        yield SUBJECT.note("sglang", found, advice)
    else:
        yield SUBJECT.ok("sglang", found)
    theirs, ours = (version.partition("+")[0] for version in (facts.torch or "", torch))
    if theirs and ours and theirs != ours:
        advice = (
            f"The trainer has {ours}.  Weights in shared memory are handles of torch, and the tests share them between "
            "two of one version; if a push fails, use --update-weight-transport bytes."
        )
        yield SUBJECT.note("torch of the servers", theirs, advice)
