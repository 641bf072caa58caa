"""The teacher's servers as one, seen from one rank: requests are balanced over them, and repeated when one fails.

Every rank asks the servers itself.  Rank 0 also owns them: it starts them, waits for them and starts them anew.
Another rank that finds a server dead suspects it; rank 0 learns that when all ranks meet (``scorer.py``), and the
others then learn where the server is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.errors import BadResponse, EngineDown, EngineTimeout, StaleWeights
from megatron_tropd.sglang.server.fleet import ServerFleet
from megatron_tropd.sglang.server.handle import MakeServer
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import ServerSettings
from megatron_tropd.teacher.server.server import TeacherModel, TeacherServer

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_ATTEMPTS = 4
"""Tries of one request: one that makes every server fail must end the run, not all the servers."""
_MAX_IN_FLIGHT = 64
"""Requests at one server from one rank; the others wait here, for whichever server is free first."""
_BAD_ANSWERS = 2
"""Answers that cannot be used, without one that can in between, after which a server is started anew."""


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


class TeacherFleet(ServerFleet[TeacherServer]):
    """All servers of the teacher.

    ``counts`` has ``retries`` besides those of ServerFleet: requests that were asked again.
    """

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
        super().__init__(settings, servers, ("retries",))
        self.router: TeacherServer | None = None
        """What takes the requests in the servers' place (--teacher-router-url) and chooses one for each."""
        if settings.router_url:
            self.router = TeacherServer(
                len(servers), settings, model, None, settings.router_url.rstrip("/"), behind=servers
            )
        self._looking = asyncio.Lock()
        self._owns = owns
        self._suspicions: dict[int, Suspicion] = {}
        self._coming_up: dict[int, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()

    # ---- life, of the owner ----

    async def open(self) -> None:
        """Start all servers at once, and watch them come up; does not wait."""
        await self.start()
        if self.router:
            await self.router.start()
        for server in self.servers:
            self._watch_come_up(server)

    async def until_up(self) -> None:
        """Wait until every server is up or given up.

        Raises:
            EngineError: all are given up, or the router does not answer.
        """
        await asyncio.gather(*self._coming_up.values())
        self._usable()
        if self.router:
            await self.router.wait_until_up()

    def _watch_come_up(self, server: TeacherServer) -> None:
        self._coming_up[server.index] = asyncio.create_task(self._come_up(server))

    async def _come_up(self, server: TeacherServer) -> None:
        try:
            while not (server.is_up or server.given_up):
                try:
                    await server.wait_until_up()
                except EngineError as error:  # one that is not ours was waited for long enough
                    await self._failed(server, error, for_good=server.server is None)
        except Exception as error:  # of any kind: requests wait for what becomes of the server
            log.exception("%s", server.name)
            server.given_up, server.last_error = True, f"{server.name}: {type(error).__name__}: {error}"
        await self._tell_all()

    async def _tell_all(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def check(self, suspicions: Mapping[int, Suspicion]) -> None:
        """Start anew what other ranks found dead, unless that was done since."""
        for index, suspicion in suspicions.items():
            await self._down(self.servers[index], EngineDown(suspicion.reason), suspicion.starts)

    async def _down(self, server: TeacherServer, error: EngineError, starts: int) -> None:
        """Handle the failure of a server in its start number ``starts``, once."""
        if server.starts != starts or not server.is_up:
            return
        if self._owns:
            await self._failed(server, error)
            self._watch_come_up(server)
        else:
            server.is_up = False
            self._suspicions[server.index] = Suspicion(starts=starts, reason=str(error))
        await self._tell_all()

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

    async def close(self) -> None:
        """Stop every server that was started here."""
        for task in self._coming_up.values():
            task.cancel()
        await asyncio.gather(*self._coming_up.values(), return_exceptions=True)
        if self.router:
            await self.router.close()
        await super().close()

    # ---- requests ----

    async def ask(self, num_tokens: int, work: Callable[[TeacherServer], Awaitable[T]]) -> T:
        """Do ``work``, about ``num_tokens`` tokens long, on the server with the least to do; on others if that fails.
        Where there is a router, do it there.

        Raises:
            RequestRefused: a server answered 4xx.
            EngineError: it failed too often, or no server is left, or the router does not answer.
        """
        tried: set[int] = set()
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            server = await self._take(num_tokens, tried)
            starts = [each.starts for each in self.servers]
            try:
                found = await work(server)
            except (EngineDown, BadResponse, StaleWeights) as error:
                failure: EngineError = error
            else:
                server.bad_answers = 0
                self._forgive(server)
                return found
            finally:
                await self._put_back(server, num_tokens)
            tried.add(server.index)
            if server is self.router:
                await self._look_behind(server, failure, starts)
            elif isinstance(failure, EngineDown):
                await self._down(server, failure, starts[server.index])
            else:
                await self._bad_answer(server, failure, starts[server.index])
            self.counts["retries"] += attempt < _MAX_ATTEMPTS
        raise EngineError(f"failed {_MAX_ATTEMPTS} times, at last: {failure}") from failure

    async def _look_behind(self, router: TeacherServer, failure: EngineError, starts: Sequence[int]) -> None:
        """Find out which servers behind the router are down after a request failed there, and wait for the router.

        The servers are in their starts number ``starts``.  Which of them had the request is not known: all are asked,
        and where the request ended because none showed progress, all are down.

        Raises:
            EngineDown: the router does not answer within the start timeout; for good, because it is not ours to start.
        """
        log.warning("a request failed: %s", failure)
        async with self._looking:
            for server in [server for server in self.servers if server.is_up]:
                try:
                    if isinstance(failure, EngineTimeout):
                        raise failure
                    await server.check_answers()
                except EngineDown as error:
                    await self._down(server, error, starts[server.index])
        if not any(server.is_up for server in self.servers):
            return  # they are at fault, and are waited for
        try:
            await router.wait_until_up()
        except EngineDown as error:
            router.given_up, router.last_error = True, str(error)
            await self._tell_all()
            raise

    async def _bad_answer(self, server: TeacherServer, error: EngineError, starts: int) -> None:
        log.warning("an answer that cannot be used: %s", error)
        server.bad_answers += 1
        if server.bad_answers >= _BAD_ANSWERS and not self._settings.urls:
            await self._down(server, error, starts)

    async def _take(self, num_tokens: int, tried: set[int]) -> TeacherServer:
        """Wait for a server that is free, one of those that were not ``tried`` while there is one; or for the router,
        which is as free as the servers that are up behind it."""
        async with self._changed:
            while True:
                up = [server for server in self._usable() if server.is_up]
                most = _MAX_IN_FLIGHT
                if self.router:
                    if self.router.given_up:
                        raise EngineDown(self.router.last_error)
                    most, up = _MAX_IN_FLIGHT * len(up), [self.router]
                fresh = [server for server in up if server.index not in tried] or up
                free = [server for server in fresh if server.requests_in_flight < most]
                if free:
                    server = min(free, key=lambda server: (server.tokens_in_flight, server.index))
                    server.requests_in_flight += 1
                    server.tokens_in_flight += num_tokens
                    return server
                await self._changed.wait()

    async def _put_back(self, server: TeacherServer, num_tokens: int) -> None:
        server.requests_in_flight -= 1
        server.tokens_in_flight -= num_tokens
        async with self._changed:
            self._changed.notify()
