"""Splits the ranks that torchrun started into worlds: the trainer's, and one for every teacher with ranks of its own.

Each world has a default process group of its own, so everything that is "collective over the world" is so over the
ranks of one role.  Ranks of two worlds speak through a mailbox (``mailbox.py``) and a side group (``bridge.py``).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from megatron_tropd.parallel.side_group import LOOPBACK, host_store

TRAINER = "trainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """Consecutive ranks of the job that work on one thing."""

    name: str
    first: int
    """First of its ranks in the job."""
    size: int

    def __contains__(self, rank: int) -> bool:
        """Whether a rank of the job has this role."""
        return self.first <= rank < self.first + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All roles of a job, and this process's rank in it."""

    roles: tuple[Role, ...]
    rank: int
    """Rank in the job, torchrun's RANK."""

    @property
    def role(self) -> Role:
        """Role of this process."""
        return next(role for role in self.roles if self.rank in role)

    def named(self, name: str) -> Role:
        """Return the role of that name."""
        return next(role for role in self.roles if role.name == name)


def split(world_size: int, others: Sequence[tuple[str, int]]) -> tuple[Role, ...]:
    """Return the roles of a job: the trainer on the first ranks, then ``others`` (name, ranks) in their order.

    Raises:
        ValueError: nothing is left for the trainer.
    """
    taken = sum(size for _, size in others)
    if taken >= world_size:
        raise ValueError(
            f"--teacher-world-size {' + '.join(str(size) for _, size in others)} leaves no rank for the student: "
            f"torchrun started {world_size}; start more with --nproc-per-node or --nnodes, or lower it"
        )
    roles = [Role(name=TRAINER, first=0, size=world_size - taken)]
    for name, size in others:
        roles.append(Role(name=name, first=roles[-1].first + roles[-1].size, size=size))
    return tuple(roles)


def job_of_environment(roles: Sequence[Role]) -> Job:
    """Return the job with ``roles`` at this process's rank."""
    return Job(roles=tuple(roles), rank=int(os.environ.get("RANK", "0")))


def join_job(timeout_s: float) -> dist.Store:
    """Return the store that all ranks of the job reach.  Collective over the job, once.

    torchrun hosts it, on every address of the machine.  Where it does not (docs/launch.md says how to tell it so) and
    all ranks are on one machine, rank 0 hosts it, on the master address only; elsewhere torch does.
    """
    if is_on_one_machine() and not _torchrun_hosts_store() and os.environ.get("RANK") == "0":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return host_store(host=host, port=port, timeout_s=timeout_s)
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s)))
    return store


def _torchrun_hosts_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def another_connection(timeout_s: float) -> dist.Store:
    """Return a connection of its own to the store of the job.  One connection serves one call at a time.

    After torchrun restarted the ranks nothing that the earlier ones left is seen.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
        timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
    )  # fmt: skip
    return dist.PrefixStore(f"tropd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def num_nodes() -> int:
    """Number of machines on which torchrun started ranks."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def node() -> int:
    """Number of this machine in the job."""
    return int(os.environ.get("GROUP_RANK", "0"))


def leads_node() -> bool:
    """Whether this process is the first on its machine."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def is_on_one_machine() -> bool:
    """Whether torchrun started all ranks of the job on this machine."""
    size = os.environ.get("WORLD_SIZE", "1")
    return os.environ.get("LOCAL_WORLD_SIZE", size) == size


def meeting_host() -> str:
    """Return the address at which ranks of different processes meet: on one machine the loopback address, on several
    torchrun's master address."""
    return LOOPBACK if is_on_one_machine() else os.environ["MASTER_ADDR"]


def own_address(peer: str) -> str:
    """Return the address of this machine on its route to ``peer``.  Its host name would not do: that may resolve to a
    loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))  # sends nothing
        return str(probe.getsockname()[0])
