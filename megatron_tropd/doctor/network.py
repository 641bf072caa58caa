"""How ranks reach each other: the host's name, its interfaces, InfiniBand."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.doctor import child
from megatron_tropd.doctor.finding import Attempts, Finding, Subject

SUBJECT = Subject(title="Network")
_NAME_DEADLINE_S = 6.0
_INFINIBAND = Path("/sys/class/infiniband")

# torchrun gives the ranks this name as MASTER_ADDR.
_ASK_NAME = """
import json, socket
name = socket.getfqdn()
print(json.dumps({"name": name}), flush=True)
print(json.dumps({"addresses": sorted({found[4][0] for found in socket.getaddrinfo(name, None)})}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFacts:
    """Facts about the network; None where they could not be read."""

    name: str | None = None
    addresses: tuple[str, ...] = ()
    """Of ``name``; none where it cannot be resolved."""
    why: str = ""
    """What the resolver said, where there are none."""
    has_port: bool | None = None
    """Whether a process can listen on the loopback interface."""
    interfaces: tuple[str, ...] | None = None
    infiniband: tuple[str, ...] | None = None
    """Adapters with a port that is up."""
    verbs: bool | None = None
    """Whether /dev/infiniband is here, without which adapters cannot be used."""
    failed: tuple[Finding, ...] = ()


def probe() -> NetworkFacts:
    """Read the facts of this machine."""
    attempts = Attempts(SUBJECT)
    # In a child process: a name server that does not answer cannot be interrupted.
    output = child.run([sys.executable, "-I", "-c", _ASK_NAME], deadline_s=_NAME_DEADLINE_S)
    said = output.answers()
    return NetworkFacts(
        name=said.get("name") or attempts.read("host name", socket.gethostname),
        addresses=tuple(said.get("addresses", ())),
        why=output.end,
        has_port=attempts.read("loopback", _has_port),
        interfaces=attempts.read("interfaces", lambda: tuple(name for _, name in socket.if_nameindex())),
        infiniband=attempts.read("InfiniBand", _active_adapters),
        verbs=attempts.read("InfiniBand", lambda: any(Path("/dev/infiniband").glob("uverbs*"))),
        failed=attempts.failed,
    )


def _has_port() -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
        except OSError:
            return False
    return True


def _active_adapters() -> tuple[str, ...]:
    up = [state for state in _INFINIBAND.glob("*/ports/*/state") if "ACTIVE" in state.read_text(encoding="utf-8")]
    return tuple(sorted({state.parts[-4] for state in up}))


def judge(facts: NetworkFacts, *, num_gpus: int) -> Iterator[Finding]:
    """Return what ``facts`` mean for a run on so many GPUs."""
    yield from facts.failed
    if facts.name is not None:
        yield _name(facts)
    if facts.has_port is False:
        advice = "Ranks and SGLang's servers find each other there.  Bring it up: ip link set lo up"
        yield SUBJECT.problem("loopback", "no process can listen on 127.0.0.1", advice)
    if facts.infiniband is not None and num_gpus:
        yield _adapters(facts, num_gpus)


def _name(facts: NetworkFacts) -> Finding:
    if not facts.addresses:
        advice = (
            "torchrun gives it to the ranks as the address of the job, and they wait for it until they give up.  Add "
            "it to /etc/hosts, or give torchrun --local-addr with an address of this host (127.0.0.1 for one node)."
        )
        return SUBJECT.problem("host name", f"{facts.name} has no address: {facts.why or 'none was found'}", advice)
    found = f"{facts.name} is {', '.join(facts.addresses)}"
    if all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in facts.addresses):
        advice = (
            "Enough for one node.  Other nodes cannot reach it: on several, set GLOO_SOCKET_IFNAME and "
            f"NCCL_SOCKET_IFNAME to the interface between them ({_listed(facts.interfaces)})."
        )
        return SUBJECT.note("host name", found, advice)
    return SUBJECT.ok("host name", found)


def _listed(interfaces: tuple[str, ...] | None) -> str:
    return ", ".join(name for name in interfaces or () if name != "lo") or "this host has none but loopback"


def _adapters(facts: NetworkFacts, num_gpus: int) -> Finding:
    adapters = facts.infiniband or ()
    found = ", ".join(adapters) or "no adapter with a port that is up"
    if adapters and facts.verbs is False:
        advice = (
            "NCCL cannot use them, and nodes exchange data over TCP, more slowly.  Give the container the devices: "
            "docker --device=/dev/infiniband --cap-add=IPC_LOCK"
        )
        return SUBJECT.note("InfiniBand", f"{found}, but /dev/infiniband is not here", advice)
    if not adapters and num_gpus > 1:
        advice = (
            "One node needs none.  Several would talk over TCP: keep --tensor-model-parallel-size and "
            "--pipeline-model-parallel-size within a node."
        )
        return SUBJECT.note("InfiniBand", found, advice)
    return SUBJECT.ok("InfiniBand", found)
