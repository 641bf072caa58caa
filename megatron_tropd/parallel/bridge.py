"""Point-to-point messages between the worlds of a job, in host memory over gloo."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron_tropd.parallel.roles import Job, another_connection, meeting_host, own_address
from megatron_tropd.parallel.side_group import side_group


class Bridge:
    """Implements Link (exchange.py) between all ranks of two roles of a job, numbered as in the job.

    Making it is collective over both roles.

    Args:
        job: of this process.
        peer: name of the role at the other end, the same at both ends.
        timeout_s: of one message.
    """

    def __init__(self, job: Job, peer: str, *, timeout_s: float) -> None:
        ends = sorted((job.role, job.named(peer)), key=lambda role: role.first)
        self._ranks = [rank for role in ends for rank in range(role.first, role.first + role.size)]
        self._rank = job.rank
        self._store = another_connection(timeout_s)
        self._group = side_group(
            self._store, name=f"bridge/{ends[1].name}", rank=self._ranks.index(job.rank), world_size=len(self._ranks),
            backend="gloo", timeout_s=timeout_s, address=own_address(meeting_host()),
        )  # fmt: skip

    @property
    def rank(self) -> int:
        """Rank in the job."""
        return self._rank

    def isend(self, tensor: Tensor, peer: int) -> Any:
        """See Link."""
        return self._group.send([tensor], self._ranks.index(peer), 0)

    def irecv(self, tensor: Tensor, peer: int) -> Any:
        """See Link."""
        return self._group.recv([tensor], self._ranks.index(peer), 0)
