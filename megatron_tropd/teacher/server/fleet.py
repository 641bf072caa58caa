"""The teacher's servers as one, seen from one rank.

Every rank asks the servers itself.  Rank 0 also owns them: it starts them, waits for them and starts them anew.
Another rank that finds a server dead suspects it; rank 0 learns that when all ranks meet (``scorer.py``), and the
others then learn where the server is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.errors import EngineDown
from megatron_tropd.sglang.server.balanced import BalancedFleet
from megatron_tropd.sglang.server.handle import MakeServer
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import ServerSettings
from megatron_tropd.teacher.server.server import TeacherModel, TeacherServer

_MAX_IN_FLIGHT = 64
"""Requests at one server from one rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerState:
    """What the owner tells other ranks of a server."""

    url: str
    starts: int
    is_up: bool
    given_up: bool
    last_error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspicion:
    """What another rank found out about a server that was started ``starts`` times."""

    starts: int
    reason: str


class TeacherFleet(BalancedFleet[TeacherServer]):
    """All servers of the teacher.  The router is that of --teacher-router-url."""

    def __init__(
        self, settings: ServerSettings, model: TeacherModel, *, owns: bool, make_server: MakeServer = ServerProcess
    ) -> None:
        if owns and not settings.urls:
            handles = [
                make_server(settings, i, model.arch.max_position_embeddings) for i in range(settings.num_servers)
            ]
            servers = [TeacherServer(i, settings, model, handle) for i, handle in enumerate(handles)]
        else:
            urls = settings.urls or ("",) * settings.num_servers
            servers = [TeacherServer(i, settings, model, None, url.rstrip("/")) for i, url in enumerate(urls)]
        router = None
        if settings.router_url:
            router = TeacherServer(len(servers), settings, model, None, settings.router_url.rstrip("/"), behind=servers)
        super().__init__(settings, servers, router=router, max_in_flight=_MAX_IN_FLIGHT)
        self._owns = owns
        self._suspicions: dict[int, Suspicion] = {}

    # ---- life, of the owner ----

    async def check(self, suspicions: Mapping[int, Suspicion]) -> None:
        """Start anew what other ranks found dead, unless that was done since."""
        for index, suspicion in suspicions.items():
            await self._down(self.servers[index], EngineDown(suspicion.reason), suspicion.starts)

    async def _replace(self, server: TeacherServer, error: EngineError) -> None:
        if self._owns:
            await super()._replace(server, error)
        else:
            server.is_up = False
            self._suspicions[server.index] = Suspicion(starts=server.starts, reason=str(error))

    def states(self) -> list[ServerState]:
        """What other ranks have to know."""
        return [
            ServerState(
                url=server.url, starts=server.starts, is_up=server.is_up, given_up=server.given_up,
                last_error=server.last_error,
            )
            for server in self.servers
        ]  # fmt: skip

    # ---- life, of other ranks ----

    def take_suspicions(self) -> dict[int, Suspicion]:
        """What this rank found out since the last call, by number of the server."""
        found, self._suspicions = self._suspicions, {}
        return found

    async def adopt(self, states: Sequence[ServerState]) -> None:
        """Take over what the owner knows."""
        if self.router:
            if not self.router.starts:
                await self.router.start()
            self.router.is_up = any(state.is_up for state in states)  # the owner waits for it together with them
        for server, state in zip(self.servers, states, strict=True):
            if state.starts != server.starts:
                server.move_to(state.url, state.starts)
                await server.start()
            if server.index not in self._suspicions:
                server.is_up = state.is_up
            server.given_up, server.last_error = state.given_up, state.last_error
        await self._tell_all()
