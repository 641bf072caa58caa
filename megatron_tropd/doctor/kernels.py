"""Compiled kernels that make a run on GPUs faster: Transformer Engine, Triton, torch's attention, apex."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.doctor.finding import Attempts, Finding, Subject
from megatron_tropd.doctor.gpus import GpuFacts
from megatron_tropd.doctor.packages import Imported, PackageFacts

SUBJECT = Subject(title="Kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerFacts:
    """What Triton needs to build its launcher, when a kernel runs for the first time."""

    compiler: bool | None = None
    headers: bool | None = None
    """Whether Python.h is there."""
    failed: tuple[Finding, ...] = ()


def probe() -> CompilerFacts:
    """Read the facts of this machine."""
    attempts = Attempts(SUBJECT)
    return CompilerFacts(
        compiler=attempts.read("compiler", _has_compiler),
        headers=attempts.read("headers", lambda: Path(sysconfig.get_path("include"), "Python.h").exists()),
        failed=attempts.failed,
    )


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name)


def judge(packages: PackageFacts, gpus: GpuFacts, compiler: CompilerFacts) -> Iterator[Finding]:
    """Return what the facts mean for a run."""
    yield from compiler.failed
    if packages.imported is not None:
        if gpus.gpus:
            yield _transformer_engine(packages.imported.get("transformer-engine"), gpus.varlen)
            yield _triton(packages.imported.get("triton"), compiler)
        else:
            yield SUBJECT.ok("Transformer Engine, Triton", "not used without a GPU")
    if gpus.varlen is not None:
        yield _varlen(gpus)
    if packages.pypi_apex:
        advice = "It is PyPI's apex, another project of that name; NVIDIA's is not needed either.  pip uninstall apex"
        yield SUBJECT.note("apex", "without NVIDIA's kernels", advice)


def _transformer_engine(imported: Imported | None, varlen: bool | None) -> Finding:
    name, install = "Transformer Engine", "pip install --no-build-isolation 'transformer-engine[pytorch]'"
    if imported is None:
        attention = "torch's flash attention under --bf16" if varlen else "on padded sequences"
        advice = (
            f"Layers are Megatron's own: attention is {attention}; norms, RoPE and AdamW are not fused, and experts "
            f"are computed one after the other.  {install}"
        )
        return SUBJECT.note(name, "not installed", advice)
    if imported.error:
        advice = (
            "A run uses it where it is installed, and would fail.  It has to be built for this torch and CUDA: "
            f"{install}, or run without it: pip uninstall transformer-engine"
        )
        return SUBJECT.problem(name, f"cannot be imported: {imported.error}", advice)
    return SUBJECT.ok(name, imported.version or "of unknown version")


def _triton(imported: Imported | None, compiler: CompilerFacts) -> Finding:
    if imported is None:
        advice = (
            "The head uses torch code in place of its kernels, which reads and writes the logits several more times.  "
            "Install the Triton of this torch: pip install triton"
        )
        return SUBJECT.note("Triton", "not installed", advice)
    if imported.error:
        advice = "A run uses it where it is installed, and would fail: pip install --force-reinstall triton"
        return SUBJECT.problem("Triton", f"cannot be imported: {imported.error}", advice)
    missing = [
        what for what, there in (("a C compiler", compiler.compiler), ("Python.h", compiler.headers)) if not there
    ]
    if missing and None not in (compiler.compiler, compiler.headers):
        advice = (
            "Triton compiles when a kernel runs for the first time, and would fail.  Install gcc and Python's headers "
            "(Debian: apt-get install gcc python3-dev), or pip uninstall triton."
        )
        return SUBJECT.problem("Triton", f"{imported.version} without {' and '.join(missing)}", advice)
    return SUBJECT.ok("Triton", imported.version or "of unknown version")


def _varlen(gpus: GpuFacts) -> Finding:
    name = "variable-length attention"
    if gpus.varlen:
        return SUBJECT.ok(name, "this torch has torch.nn.attention.varlen")
    found = "this torch has no torch.nn.attention.varlen"
    if not gpus.gpus:
        return SUBJECT.ok(name, found)
    advice = (
        "Without Transformer Engine, attention pads every sequence of a micro-batch to the longest.  Install torch "
        "2.10 or newer, or Transformer Engine."
    )
    return SUBJECT.note(name, found, advice)
