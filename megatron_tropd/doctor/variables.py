"""Environment variables that slow a run down or break it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_tropd.doctor.finding import Finding, Subject

SUBJECT = Subject(title="Environment variables")


@dataclass(frozen=True, slots=True, kw_only=True)
class VariableFacts:
    """The environment."""

    values: Mapping[str, str] = field(default_factory=dict)
    failed: tuple[Finding, ...] = ()


def probe() -> VariableFacts:
    """Read the facts of this process."""
    return VariableFacts(values=dict(os.environ))


def _is_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "on")


def _is_loud(value: str) -> bool:
    return value.strip().upper() in ("INFO", "TRACE", "DETAIL")


_EVERYWHERE: dict[str, tuple[Callable[[str], bool], str]] = {
    "HF_HUB_OFFLINE": (_is_on, "Models and data sets of the Hub are taken from its cache only.  To fetch: unset it."),
    "TORCH_DISTRIBUTED_DEBUG": (_is_loud, "torch checks every collective with another one.  Unset it."),
}
_ON_GPUS: dict[str, tuple[Callable[[str], bool], str]] = {
    "NCCL_DEBUG": (_is_loud, "NCCL writes thousands of lines between those of the run.  Unset it, or set it to WARN."),
    "NCCL_P2P_DISABLE": (_is_on, "GPUs of a host exchange data through its memory, not over NVLink.  Unset it."),
    "NCCL_SHM_DISABLE": (_is_on, "Ranks of a host that cannot reach each other's GPU use the network.  Unset it."),
    "NCCL_IB_DISABLE": (_is_on, "Nodes exchange data over TCP, not over InfiniBand.  Unset it."),
    "CUDA_LAUNCH_BLOCKING": (_is_on, "The CPU waits for every kernel, which is for debugging.  Unset it."),
    "TORCHDYNAMO_DISABLE": (_is_on, "Megatron's fused activations are not compiled.  Unset it."),
}
"""Variable -> which of its values are noted, and what those cost."""


def judge(
    facts: VariableFacts, *, num_gpus: int, hopper: bool, cpus: int, interfaces: tuple[str, ...]
) -> Iterator[Finding]:
    """Return what ``facts`` mean for a run.

    Args:
        facts: the variables.
        num_gpus: number of GPUs of this host.
        hopper: whether they are of NVIDIA's Hopper generation or older.
        cpus: number of cores, 0 where unknown.
        interfaces: the network interfaces, empty where unknown.
    """
    yield from facts.failed
    findings = [
        *_gloo_interface(facts.values, interfaces),
        *_threads(facts.values, cpus),
        *(_connections(facts.values) if num_gpus > 1 and hopper else ()),
        *(_allocator(facts.values) if num_gpus else ()),
        *_noted(facts.values, {**_EVERYWHERE, **(_ON_GPUS if num_gpus else {})}),
    ]
    yield from findings or [SUBJECT.ok("variables", "none that slows a run down or breaks it")]


def _noted(values: Mapping[str, str], table: Mapping[str, tuple[Callable[[str], bool], str]]) -> Iterator[Finding]:
    for name, (is_noted, cost) in table.items():
        if name in values and is_noted(values[name]):
            yield SUBJECT.note(name, values[name], cost)


def _gloo_interface(values: Mapping[str, str], interfaces: tuple[str, ...]) -> Iterator[Finding]:
    names = [name for name in values.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    if interfaces and (missing := [name for name in names if name not in interfaces]):
        advice = f"gloo fails at the start of a run.  This host has {', '.join(interfaces)}: set it to one of them."
        yield SUBJECT.problem("GLOO_SOCKET_IFNAME", f"there is no interface {', '.join(missing)}", advice)


def _threads(values: Mapping[str, str], cpus: int) -> Iterator[Finding]:
    given = values.get("OMP_NUM_THREADS")
    if given is None:
        return
    if not given.isdecimal() or int(given) < 1:
        advice = "OpenMP takes as many threads as there are cores, in every rank.  Set a number."
        yield SUBJECT.note("OMP_NUM_THREADS", f"{given} is no number", advice)
    elif cpus and int(given) > cpus:
        advice = f"There are {cpus} cores; the threads of each rank wait for one another.  Set cores / ranks."
        yield SUBJECT.note("OMP_NUM_THREADS", given, advice)


def _connections(values: Mapping[str, str]) -> Iterator[Finding]:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    if values.get(name) != "1":
        advice = (
            "Under --tensor-model-parallel-size above 1 and --sequence-parallel, Megatron relies on 1 to begin "
            f"communication before computation; otherwise they overlap less.  export {name}=1"
        )
        yield SUBJECT.note(name, values.get(name, "not set"), advice)


def _allocator(values: Mapping[str, str]) -> Iterator[Finding]:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if "expandable_segments:true" in values.get(name, "").replace(" ", "").lower():
            advice = (
                "Some versions of torch cannot hand such memory to another process, which a push to SGLang's servers "
                "does.  If it fails: unset it, or use --update-weight-transport bytes."
            )
            yield SUBJECT.note(name, values[name], advice)
