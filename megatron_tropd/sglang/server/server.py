"""One SGLang server, started here or elsewhere: its life, and questions to it.  Subclasses say what it is for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_tropd.errors import EngineError
from megatron_tropd.json_files import shown
from megatron_tropd.sglang.api.client import Client
from megatron_tropd.sglang.api.control import Load, ServerInfo, read_load, read_server_info, together
from megatron_tropd.sglang.api.progress import ProgressWatch
from megatron_tropd.sglang.errors import BadResponse, EngineDown, EngineTimeout, NoConnection, StaleWeights, UnfitServer
from megatron_tropd.sglang.server.handle import ServerHandle
from megatron_tropd.sglang.settings import START_TIMEOUT_FLAG, ServerSettings

log = logging.getLogger(__name__)

_POLL_S = 0.25
_START_ANSWER_S = 5.0
"""Of one question to a server that may not be up yet; it is asked again until the start timeout."""
_LOAD_ANSWERS_PER_SILENCE = 4


class Server:
    """Server number ``index``: started by this job (``server``), or running elsewhere (``url``).

    A router, which stands before others, is one too: it is asked for what they write, and knows nothing of itself that
    would have to fit.  ``behind`` are these servers; their progress is its own.
    """

    def __init__(
        self, index: int, settings: ServerSettings, server: ServerHandle | None, url: str = "",
        behind: Sequence[Server] = (),
    ) -> None:  # fmt: skip
        self.index, self._settings, self.server, self._url, self._behind = index, settings, server, url, behind
        self._client: Client | None = None
        self._last_load: Load | None = None
        self._watch = ProgressWatch(self.name, self._load, settings.request_timeout_s)
        self._earlier_bytes = 0
        self.is_cpu = False
        self.is_up = self._was_up = False
        self.failures = self.successes = 0
        """Failures that count, and successes since the last one."""
        self.given_up = False
        self.last_error = "not started"
        self.max_tokens = 0
        """Longest sequence (prompt and response) that the server can complete, in tokens."""
        self.tp_size = settings.tp_size
        self.ep_size = 1
        self.starts = 0
        """Number of starts, which distinguishes one server process from the next of the same name."""

    @property
    def url(self) -> str:
        """Address of the last start."""
        return self.server.url if self.server else self._url

    @property
    def name(self) -> str:
        """Number and address of the server, for messages."""
        if self._behind:
            return f"the router ({self._settings.names.router} {self.url})"
        return f"{self._settings.names.what} {self.index} ({self.url})"

    @property
    def received_bytes(self) -> int:
        """Bytes of all answers so far."""
        return self._earlier_bytes + (self._client.received_bytes if self._client else 0)

    # ---- life ----

    async def start(self) -> None:
        """Start (again) what was started here, and forget what the old server held; does not wait."""
        self.is_up = False
        self.starts += 1
        await self._disconnect()
        if self.server is None:
            self._client = Client(self.name, self._url, self._settings.keys)
        else:
            await asyncio.to_thread(self.server.start)  # one of another machine is waited for
            self._client = Client(self.name, self.server.url, self._settings.keys, self.server.is_running)
        self._watch = ProgressWatch(self.name, self._load, self._settings.request_timeout_s)

    async def wait_until_up(self) -> None:
        """Until the server answers.

        Raises:
            EngineDown: it ended, or did not answer within the start timeout; with the end of its log.
            BadResponse: its answers are not those of an SGLang server, and never were.  One that was up before is
                waited for: a proxy may speak in its place.
            UnfitServer: it runs with settings that do not fit this run.
        """
        deadline = asyncio.get_running_loop().time() + self._settings.start_timeout_s
        while True:
            await self.check_process()
            try:
                await self.check_answers()
                if not self._behind:
                    await self._learn()
                break
            except (EngineDown, BadResponse) as error:
                if isinstance(error, BadResponse) and not self._was_up:
                    raise
                problem = error
            if asyncio.get_running_loop().time() > deadline:
                raise EngineDown(
                    f"{self.name} did not answer within {self._settings.start_timeout_s:g} s ({START_TIMEOUT_FLAG}), "
                    f"at last: {problem}; {self._log()}"
                )
            await asyncio.sleep(_POLL_S)
        self.is_up = self._was_up = True

    async def check_answers(self) -> None:
        """Raises EngineDown if it does not answer soon.

        A router is asked for what a server behind it says until it is up, and then for any answer of its own: it may go
        on asking one that has died for minutes, though it gives the requests to others.
        """
        if not (self._behind and self.is_up):
            await self._get("/get_model_info" if self._behind else "/model_info", timeout_s=_START_ANSWER_S)
            return
        try:
            await self._get("/health", timeout_s=_START_ANSWER_S)
        except (NoConnection, EngineTimeout):
            raise
        except EngineError as error:
            log.debug("%s answers: %s", self.name, error)

    async def check_process(self) -> None:
        """Raises EngineDown if the process that was started here has ended."""
        if self.server is not None and not self.server.is_running():
            raise EngineDown(f"{self.name} ended with status {self.server.exit_status()}; {self._log()}")

    async def _learn(self) -> None:
        """Ask the server what it is, and check that."""
        answer = await self._get("/server_info")
        with self._named("/server_info"):
            info = read_server_info(answer)
            self._check_dtype(info)
            self._take_info(info)

    def _take_info(self, info: ServerInfo) -> None:
        self.is_cpu, self.tp_size, self.ep_size = info.is_cpu, info.tp_size, info.ep_size
        self.max_tokens = info.max_tokens

    def _check_dtype(self, info: ServerInfo) -> None:
        if info.dtype != self._settings.dtype:
            raise UnfitServer(
                f"{self.name} holds weights in {shown(info.dtype)}, this run's are {self._settings.dtype}: "
                f"start it with --dtype {self._settings.dtype}"
            )

    async def _load(self) -> Load:
        if self._behind:
            return await self._load_behind()
        path = "/v1/loads?include=core"
        answer = await self._get(path, timeout_s=self._settings.request_timeout_s / _LOAD_ANSWERS_PER_SILENCE)
        with self._named(path):
            self._last_load = read_load(answer)
        return self._last_load

    async def _load_behind(self) -> Load:
        """Load of all servers behind this router; of one that does not answer now the last that it told, because a load
        that is left out would look like work."""
        results = await asyncio.gather(*(server._load() for server in self._behind), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, EngineError):
                raise result
        failures = [result for result in results if isinstance(result, EngineError)]
        if len(failures) == len(results):
            raise failures[0]
        return together([server._last_load for server in self._behind if server._last_load is not None])

    def _log(self) -> str:
        return (
            "it is not ours to start" if self.server is None else f"end of {self.server.log}:\n{self.server.log_tail()}"
        )

    async def close(self) -> None:
        """Stop what was started here."""
        self.is_up = False
        await self._disconnect()
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            self._earlier_bytes += client.received_bytes
            with contextlib.suppress(Exception):  # broken connections may not close cleanly
                await client.close()

    # ---- questions ----

    async def _ask(self, body: dict[str, Any], what: str) -> Any:
        """The answer of /generate, however long it takes, as long as the server shows that it works."""
        async with self._watch.until_silent(what):
            return await self._connected().post(
                "/generate", body, what=what, timeout_s=None, repeatable=True, admin=False
            )

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except (BadResponse, StaleWeights) as error:
            raise type(error)(f"{self.name}: {what}: {error}") from None

    async def _get(self, path: str, timeout_s: float | None = None) -> Any:
        return await self._connected().get(path, timeout_s=timeout_s or self._settings.request_timeout_s)

    async def _post(self, path: str, body: dict[str, Any] | bytes, *, what: str, timeout_s: float | None = None) -> Any:
        limit = timeout_s or self._settings.request_timeout_s
        return await self._connected().post(path, body, what=what, timeout_s=limit)

    def _connected(self) -> Client:
        if self._client is None:
            raise EngineDown(f"{self.name} was not started")
        return self._client
