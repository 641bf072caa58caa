"""Ends requests at a server that has fallen silent, and no others: how long an answer takes depends on its length."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.api.control import Load
from megatron_tropd.sglang.errors import EngineTimeout
from megatron_tropd.sglang.settings import REQUEST_TIMEOUT_FLAG

_ASKS_PER_SILENCE = 20
_LONGEST_PAUSE_S = 5.0


class ProgressWatch:
    """Watches one server while requests wait for its answer; asks for its load a few times per ``silence_s``.

    A request ends when the server's load shows no work for ``silence_s``: the scheduler is stuck or paused, it is
    gone, or it is idle because it has forgotten the request.  While it works for any request, none is ended.
    """

    def __init__(self, name: str, ask: Callable[[], Awaitable[Load]], silence_s: float) -> None:
        self._name, self._ask, self._silence_s = name, ask, silence_s
        self._waiting: set[asyncio.Timeout] = set()
        self._task: asyncio.Task[None] | None = None
        self._load: Load | None = None
        self._worked_at: float | None = None
        """When the load last showed new work, by the clock of the event loop."""
        self._problem = ""
        """Why the load could not be read when it was last asked for; empty if it could."""

    @contextlib.asynccontextmanager
    async def until_silent(self, what: str) -> AsyncIterator[None]:
        """Let the body run until the server has been silent for too long.

        Raises:
            EngineTimeout: it has; the message names ``what``, the flag, and what the server last showed.
        """
        deadline = asyncio.timeout(self._silence_s)
        try:
            async with deadline:
                self._waiting.add(deadline)
                if self._task is None:
                    self._task = asyncio.create_task(self._keep_asking())
                yield
        except TimeoutError:
            if not deadline.expired():
                raise
            raise EngineTimeout(f"{self._name}: {what}: {self._silence()}") from None
        finally:
            self._waiting.discard(deadline)
            if not self._waiting and self._task is not None:
                self._task.cancel()
                self._task = None

    async def _keep_asking(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(self._silence_s / _ASKS_PER_SILENCE, _LONGEST_PAUSE_S))
            try:
                load = await self._ask()
            except EngineError as error:
                self._problem = str(error)
                continue
            self._problem = ""
            before, self._load = self._load, load
            if before is None or before.work == load.work:
                continue
            self._worked_at = loop.time()
            for deadline in self._waiting:
                if not deadline.expired():
                    deadline.reschedule(self._worked_at + self._silence_s)

    def _silence(self) -> str:
        now = asyncio.get_running_loop().time()
        seen = (
            "none was ever seen"
            if self._worked_at is None
            else f"the last one was seen {now - self._worked_at:.1f} s ago"
        )
        state = "" if self._load is None else f"; it reports {self._load}"
        problem = f"; {self._problem}" if self._problem else ""
        return (
            f"no answer, and no sign of progress from the server for {self._silence_s:g} s ({REQUEST_TIMEOUT_FLAG}): "
            f"{seen}{state}{problem}. If the server was only slow, raise {REQUEST_TIMEOUT_FLAG} above the time of its "
            "longest prefill and of 15 steps of decoding; otherwise its log says why it stopped"
        )
