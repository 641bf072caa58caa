"""All probes of a machine, side by side, and all judgements of what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from megatron_tropd.doctor import gpus, host, kernels, network, packages, sandbox, sglang, variables
from megatron_tropd.doctor.finding import Finding, Subject


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is known about a machine, by subject.  A field of facts that is not given was not read."""

    packages: packages.PackageFacts = field(default_factory=packages.PackageFacts)
    gpus: gpus.GpuFacts = field(default_factory=gpus.GpuFacts)
    compiler: kernels.CompilerFacts = field(default_factory=kernels.CompilerFacts)
    host: host.HostFacts = field(default_factory=host.HostFacts)
    network: network.NetworkFacts = field(default_factory=network.NetworkFacts)
    sglang: sglang.SGLangFacts = field(default_factory=sglang.SGLangFacts)
    sandbox: sandbox.SandboxFacts = field(default_factory=sandbox.SandboxFacts)
    variables: variables.VariableFacts = field(default_factory=variables.VariableFacts)


def probe(sglang_python: str) -> Machine:
    """Read the facts of this machine.  ``sglang_python``: value of that flag, empty where it is not given."""
    probes: dict[str, tuple[Subject, type, Callable[[], Any]]] = {
        "packages": (packages.SUBJECT, packages.PackageFacts, packages.probe),
        "gpus": (gpus.SUBJECT, gpus.GpuFacts, gpus.probe),
        "compiler": (kernels.SUBJECT, kernels.CompilerFacts, kernels.probe),
        "host": (host.SUBJECT, host.HostFacts, host.probe),
        "network": (network.SUBJECT, network.NetworkFacts, network.probe),
        "sglang": (sglang.SUBJECT, sglang.SGLangFacts, lambda: sglang.probe(sglang_python)),
        "sandbox": (sandbox.SUBJECT, sandbox.SandboxFacts, sandbox.probe),
        "variables": (variables.SUBJECT, variables.VariableFacts, variables.probe),
    }
    try:
        with ThreadPoolExecutor(len(probes)) as pool:  # they wait for children most of the time
            facts = list(pool.map(_guarded, probes.values()))
    except RuntimeError:  # the limit of processes lets no thread start
        facts = list(map(_guarded, probes.values()))
    return Machine(**dict(zip(probes, facts, strict=True)))


def _guarded(probing: tuple[Subject, type, Callable[[], Any]]) -> Any:
    subject, facts, call = probing
    try:
        return call()
    except Exception as error:
        return facts(failed=(subject.failed("facts", error),))


def judge(machine: Machine) -> list[Finding]:
    """Return all findings about ``machine``, by subject."""
    count = len(machine.gpus.gpus)
    judgements: dict[Subject, Callable[[], Iterator[Finding]]] = {
        packages.SUBJECT: lambda: packages.judge(machine.packages),
        gpus.SUBJECT: lambda: gpus.judge(machine.gpus),
        kernels.SUBJECT: lambda: kernels.judge(machine.packages, machine.gpus, machine.compiler),
        host.SUBJECT: lambda: host.judge(
            machine.host,
            num_gpus=count,
            gpu_bytes=sum(gpu.memory_bytes for gpu in machine.gpus.gpus),
            infiniband=bool(machine.network.infiniband),
        ),
        network.SUBJECT: lambda: network.judge(machine.network, num_gpus=count),
        sglang.SUBJECT: lambda: sglang.judge(machine.sglang, torch=machine.gpus.torch),
        sandbox.SUBJECT: lambda: sandbox.judge(machine.sandbox),
        variables.SUBJECT: lambda: variables.judge(
            machine.variables,
            num_gpus=count,
            hopper=any(gpu.capability < (10, 0) for gpu in machine.gpus.gpus),
            cpus=machine.host.cpus or 0,
            interfaces=machine.network.interfaces or (),
        ),
    }
    findings: list[Finding] = []
    for subject, judgement in judgements.items():
        try:
            findings += judgement()
        except Exception as error:
            findings.append(subject.failed("judgement", error))
    return findings
