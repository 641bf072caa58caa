"""Python and the packages that the trainer imports."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata

from megatron_tropd.doctor import child
from megatron_tropd.doctor.finding import Attempts, Finding, Subject
from megatron_tropd.doctor.versions import MEGATRON_OF_PYTHON, REQUIRED, TRANSFORMERS

SUBJECT = Subject(title="Python and packages")

_IMPORTS = {
    "megatron-core": "megatron.core.models.gpt",
    "transformers": "transformers.models.auto.modeling_auto",
    "triton": "triton",
    "transformer-engine": "transformer_engine.pytorch",
}
"""What is imported, in this order; the likeliest to end its process comes last.  Other packages are only looked up."""
OPTIONAL = {
    "langdetect": ("instructions", "rows with constraints on the language of a response are refused"),
    "tensorboard": ("tensorboard", "--tensorboard-dir is refused"),
    "wandb": ("wandb", "--wandb-project is refused"),
}
"""Package -> its extra in pyproject.toml, and what a run cannot do without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What came of the import of a package."""

    version: str | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageFacts:
    """Facts about this interpreter; None where they could not be read."""

    python: tuple[int, int, int] | None = None
    versions: Mapping[str, str] | None = None
    """The installed ones of REQUIRED and OPTIONAL, by name."""
    imported: Mapping[str, Imported] | None = None
    """Those of _IMPORTS that are there.  ``triton`` and ``transformer-engine`` may be missing."""
    pypi_apex: bool | None = None
    """Whether a package ``apex`` is there that has none of NVIDIA's kernels."""
    failed: tuple[Finding, ...] = ()


def probe() -> PackageFacts:
    """Read the facts of this machine."""
    attempts = Attempts(SUBJECT)
    return PackageFacts(
        python=attempts.read("Python", lambda: sys.version_info[:3]),
        versions=attempts.read("installed packages", _installed),
        imported=attempts.read("imports", _imported),
        pypi_apex=attempts.read("apex", lambda: _exists("apex") and not _exists("amp_C")),
        failed=attempts.failed,
    )


def _installed() -> dict[str, str]:
    found = {}
    for name in (*REQUIRED, *OPTIONAL):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _exists(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _imported() -> dict[str, Imported]:
    wanted = {name: module for name, module in _IMPORTS.items() if _exists(module.partition(".")[0])}
    found: dict[str, Imported] = {}
    while left := {name: module for name, module in wanted.items() if name not in found}:
        output = child.ask("import", *(f"{name}={module}" for name, module in left.items()))
        answers = output.answers()
        found |= {name: Imported(**answers[name]) for name in left if name in answers}
        if unanswered := [name for name in left if name not in answers]:  # the first of them ended the process
            found[unanswered[0]] = Imported(error=output.end or "no answer")
    return found


def judge(facts: PackageFacts) -> Iterator[Finding]:
    """Return what ``facts`` mean for a run."""
    yield from facts.failed
    if facts.python is not None:
        yield _python(facts.python)
        if facts.imported is not None:
            yield _megatron(facts.imported.get("megatron-core"), facts.python[:2])
    if facts.imported is not None:
        yield _transformers(facts.imported.get("transformers"))
    if facts.versions is not None:
        yield from _others(facts.versions)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _python(version: tuple[int, int, int]) -> Finding:
    if version[:2] not in MEGATRON_OF_PYTHON:
        tested = ", ".join(map(_dotted, MEGATRON_OF_PYTHON))
        return SUBJECT.note("Python", _dotted(version), f"No test has run with it.  Tested: {tested}.")
    return SUBJECT.ok("Python", _dotted(version))


def _megatron(imported: Imported | None, python: tuple[int, int]) -> Finding:
    tested = MEGATRON_OF_PYTHON.get(python)
    install = f"pip install megatron-core=={tested or MEGATRON_OF_PYTHON[max(MEGATRON_OF_PYTHON)]}"
    if imported is None:
        return SUBJECT.problem("megatron-core", "not installed", f"Nothing can be trained without it: {install}")
    if imported.error:
        advice = f"Nothing can be trained until it can be imported: {install}"
        return SUBJECT.problem("megatron-core", f"cannot be imported: {imported.error}", advice)
    found = imported.version or "of unknown version"
    if tested and found.partition("+")[0] != tested:  # 0.19 adds the commit of a repository that it lies in
        advice = f"With Python {_dotted(python)} the tests run with {tested}.  If this one fails: {install}"
        return SUBJECT.note("megatron-core", found, advice)
    return SUBJECT.ok("megatron-core", found)


def _transformers(imported: Imported | None) -> Finding:
    install = f"pip install transformers=={TRANSFORMERS}"
    if imported is None:
        advice = f"No model or tokenizer can be read without it: {install}"
        return SUBJECT.problem("transformers", "not installed", advice)
    if imported.error:
        advice = f"No model or tokenizer can be read until it can be imported: {install}"
        return SUBJECT.problem("transformers", f"cannot be imported: {imported.error}", advice)
    if imported.version != TRANSFORMERS:
        advice = f"The tests run with {TRANSFORMERS}.  If this one fails: {install}"
        return SUBJECT.note("transformers", imported.version or "of unknown version", advice)
    return SUBJECT.ok("transformers", TRANSFORMERS)


def _others(versions: Mapping[str, str]) -> Iterator[Finding]:
    others = [name for name in REQUIRED if name not in ("torch", *_IMPORTS)]  # those have rows of their own
    if missing := [name for name in others if name not in versions]:
        advice = f"A run imports them: pip install {' '.join(missing)}"
        yield SUBJECT.problem("other requirements", f"not installed: {', '.join(missing)}", advice)
    else:
        listed = ", ".join(f"{name} {versions[name]}" for name in ("safetensors", "datasets"))
        yield SUBJECT.ok("other requirements", f"{listed} and {len(others) - 2} more")
    for name, (extra, cost) in OPTIONAL.items():
        if name in versions:
            yield SUBJECT.ok(name, versions[name])
        else:
            advice = f"{cost}; nothing else needs it.  pip install 'megatron-tropd[{extra}]'"
            yield SUBJECT.note(name, "not installed", advice)
