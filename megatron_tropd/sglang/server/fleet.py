"""Several servers of one use: started together, restarted when they fail, given up when they fail too often."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Generic, TypeVar

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.errors import UnfitServer
from megatron_tropd.sglang.server.server import Server
from megatron_tropd.sglang.settings import ServerSettings

log = logging.getLogger(__name__)

S = TypeVar("S", bound=Server)

_GOOD_ENOUGH = 20
"""Successes without a failure in between after which earlier failures of a server no longer count."""


class ServerFleet(Generic[S]):
    """All servers of one use, on the one rank that starts them.

    ``counts`` are what happened so far, by name: ``restarts``, ``given_up`` and the names given here.
    """

    def __init__(self, settings: ServerSettings, servers: Sequence[S], counts: Collection[str] = ()) -> None:
        self._settings, self.servers = settings, list(servers)
        self.counts: Counter[str] = Counter(dict.fromkeys(("restarts", "given_up", *counts), 0))

    async def start(self) -> None:
        """Start all servers at once; :meth:`wait_until_up` waits for them."""
        await asyncio.gather(*(server.start() for server in self.servers))

    async def wait_until_up(self) -> None:
        """Until every server that is not given up answers; failed starts are tried again.

        A server that has ended unnoticed is started at once, together with those that are waited for.

        Raises:
            EngineError: none is left.
        """
        await self._each([server for server in self._usable() if server.is_up], lambda server: server.check_process())
        while down := [server for server in self._usable() if not server.is_up]:
            await self._each(down, lambda server: server.wait_until_up())

    def _usable(self) -> list[S]:
        usable = [server for server in self.servers if not server.given_up]
        if not usable:
            reasons = "\n".join(server.last_error for server in self.servers)
            raise EngineError(f"no SGLang {self._settings.names.what} is left:\n{reasons}")
        return usable

    async def _each(self, servers: list[S], work: Callable[[S], Awaitable[None]]) -> None:
        """Do ``work`` on all of them together; one that fails is started anew, or given up."""
        results = await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)
        for server, result in zip(servers, results, strict=True):
            if isinstance(result, EngineError):
                await self._failed(server, result)
            elif isinstance(result, BaseException):
                raise result

    async def _failed(self, server: S, error: EngineError, *, for_good: bool = False) -> None:
        """Start ``server`` anew, or give it up: it failed ``for_good`` or too often, or would not fit again."""
        what = self._settings.names.what
        server.is_up = False
        server.failures, server.successes = server.failures + 1, 0
        server.last_error = str(error)
        if for_good or server.failures > self._settings.max_failures or isinstance(error, UnfitServer):
            server.given_up = True
            self.counts["given_up"] += 1
            log.error("%s %d failed %d times and is given up: %s", what, server.index, server.failures, error)
            await server.close()
            return
        self.counts["restarts"] += 1
        log.warning("%s %d failed and is restarted: %s", what, server.index, error)
        await server.start()

    def _forgive(self, server: S) -> None:
        """Count a success; after enough of them reset the server's failures, so that old ones do not add up."""
        server.successes += 1
        if server.successes >= _GOOD_ENOUGH:
            server.failures = 0

    async def close(self) -> None:
        """Stop every server that was started here."""
        await asyncio.gather(*(server.close() for server in self.servers))

    @property
    def max_tokens(self) -> int:
        """Longest sequence (tokens) that every server can complete."""
        return min(server.max_tokens for server in self._usable())
