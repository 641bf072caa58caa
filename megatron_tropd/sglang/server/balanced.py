"""Servers that answer requests of any kind: requests are balanced over them, and asked again when one fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TypeVar

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.errors import BadResponse, EngineDown, EngineTimeout, StaleWeights
from megatron_tropd.sglang.server.fleet import ServerFleet
from megatron_tropd.sglang.server.server import Server
from megatron_tropd.sglang.settings import ServerSettings

log = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_ATTEMPTS = 4
"""Tries of one request: one that makes every server fail must end the work, not all the servers."""
_BAD_ANSWERS = 2
"""Answers that cannot be used, without one that can in between, after which a server is started anew."""


class AskedServer(Server):
    """A server of a :class:`BalancedFleet`, with the account of what it was asked."""

    requests_in_flight = tokens_in_flight = 0
    bad_answers = 0
    """Answers that could not be used, since the last one that could."""

    async def start(self) -> None:
        """Start (again) what was started here; does not wait."""
        self.bad_answers = 0
        await super().start()


A = TypeVar("A", bound=AskedServer)


class BalancedFleet(ServerFleet[A]):
    """Servers that any request may be asked of.

    ``counts`` has ``retries`` besides those of ServerFleet: requests that were asked again.

    Args:
        settings: of the servers.
        servers: not started yet.
        router: what takes the requests in the servers' place and chooses one for each; None: nothing does.
        max_in_flight: requests at one server; the others wait here, for whichever server is free first.
        counts: further names of ``counts``.
    """

    def __init__(
        self, settings: ServerSettings, servers: Sequence[A], *, router: A | None, max_in_flight: int,
        counts: Collection[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(settings, servers, ("retries", *counts))
        self.router = router
        self._max_in_flight = max_in_flight
        self._looking = asyncio.Lock()
        self._coming_up: dict[int, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()

    # ---- life ----

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

    async def until_any_is_up(self) -> None:
        """Wait until a server is up and the router, if any, answers; :meth:`ask` finds the servers that come later.

        Raises:
            EngineError: all are given up, or the router does not answer.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: any(server.is_up for server in self._usable()))
        if self.router:
            await self.router.wait_until_up()

    def _watch_come_up(self, server: A) -> None:
        self._coming_up[server.index] = asyncio.create_task(self._come_up(server))

    async def _come_up(self, server: A) -> None:
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

    async def _down(self, server: A, error: EngineError, starts: int) -> None:
        """Handle the failure of a server in its start number ``starts``, once."""
        if server.starts == starts and server.is_up:
            await self._replace(server, error)
            await self._tell_all()

    async def _replace(self, server: A, error: EngineError) -> None:
        """Start a server anew that is down, or give it up."""
        await self._failed(server, error)
        self._watch_come_up(server)

    async def close(self) -> None:
        """Stop every server that was started here."""
        for task in self._coming_up.values():
            task.cancel()
        await asyncio.gather(*self._coming_up.values(), return_exceptions=True)
        if self.router:
            await self.router.close()
        await super().close()

    # ---- requests ----

    async def ask(self, num_tokens: int, work: Callable[[A], Awaitable[T]]) -> T:
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

    async def _look_behind(self, router: A, failure: EngineError, starts: Sequence[int]) -> None:
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

    async def _bad_answer(self, server: A, error: EngineError, starts: int) -> None:
        log.warning("an answer that cannot be used: %s", error)
        server.bad_answers += 1
        if server.bad_answers >= _BAD_ANSWERS and not self._settings.urls:
            await self._down(server, error, starts)

    async def _take(self, num_tokens: int, tried: set[int]) -> A:
        """Wait for a server that is free, one of those that were not ``tried`` while there is one; or for the router,
        which is as free as the servers that are up behind it."""
        async with self._changed:
            while True:
                up = [server for server in self._usable() if server.is_up]
                most = self._max_in_flight
                if self.router:
                    if self.router.given_up:
                        raise EngineDown(self.router.last_error)
                    most, up = self._max_in_flight * len(up), [self.router]
                fresh = [server for server in up if server.index not in tried] or up
                free = [server for server in fresh if server.requests_in_flight < most]
                if free:
                    server = min(free, key=lambda server: (server.tokens_in_flight, server.index))
                    server.requests_in_flight += 1
                    server.tokens_in_flight += num_tokens
                    return server
                await self._changed.wait()

    async def _put_back(self, server: A, num_tokens: int) -> None:
        server.requests_in_flight -= 1
        server.tokens_in_flight -= num_tokens
        async with self._changed:
            self._changed.notify_all()  # one that was woken alone might look for another server than this
