"""HTTP to one server, with deadlines, bounded retries and typed errors."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import httpx2

from megatron_tropd.rollout.sglang.errors import BadResponse, EngineDown, EngineTimeout, RequestRefused
from megatron_tropd.rollout.sglang.settings import Keys

_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.2
_BUSY = frozenset({429, 503})
_SHOWN = 600


class Client:
    """Requests to one server.  ``name`` opens every error message.

    A request is repeated, a few times and ever later, when no connection could be made, when the server
    is busy (429, 503), and, if it is ``repeatable``, when the connection broke; not when ``is_running``
    says that there is nothing to connect to.  Other 4xx and 5xx are final.

    Raises (every method):
        RequestRefused: 4xx (429 after the last attempt).
        EngineTimeout: no answer within the deadline, retries included.
        EngineDown: 5xx (503 after the last attempt), or no connection after the last attempt.
        BadResponse: the answer is not JSON.
    """

    def __init__(self, name: str, url: str, keys: Keys | None, is_running: Callable[[], bool] = lambda: True) -> None:
        self.name, self.url, self._keys, self._is_running = name, url, keys, is_running
        self._closed = False
        # trust_env=False: a proxy of the environment must not see tokens, weights or keys.
        self._http = httpx2.AsyncClient(
            base_url=url, timeout=None, trust_env=False, limits=httpx2.Limits(max_connections=None)
        )

    async def get(self, path: str, *, timeout_s: float) -> Any:
        """Ask for ``path``."""
        return await self._call("GET", path, None, what=path, timeout_s=timeout_s, repeatable=True, admin=False)

    async def post(
        self, path: str, body: dict[str, Any] | bytes, *, what: str, timeout_s: float,
        repeatable: bool = False, admin: bool = True,
    ) -> Any:  # fmt: skip
        """Send JSON, or bytes that are JSON already.

        Args:
            path: of the endpoint.
            body: an empty dict where the endpoint wants none.
            what: names the work in error messages (step, prompts, tensors).
            timeout_s: for all attempts together.
            repeatable: sending twice does no harm.
            admin: authorize with the admin key; generation takes the other one.
        """
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self._call("POST", path, data, what=what, timeout_s=timeout_s, repeatable=repeatable, admin=admin)

    async def _call(
        self, method: str, path: str, data: bytes | None, *, what: str, timeout_s: float, repeatable: bool, admin: bool
    ) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._attempts(method, path, data, what, repeatable, admin)
        except TimeoutError:
            raise EngineTimeout(f"{self.name}: {what}: no answer within {timeout_s:g} s") from None

    async def _attempts(
        self, method: str, path: str, data: bytes | None, what: str, repeatable: bool, admin: bool
    ) -> Any:
        headers = {"content-type": "application/json"}
        if self._keys is not None:
            headers["authorization"] = f"Bearer {self._keys.admin if admin else self._keys.api}"
        failure = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await asyncio.sleep(_FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            if self._closed or not self._is_running():
                failure = failure or "it does not run"
                break
            try:
                response = await self._http.request(method, path, content=data, headers=headers)
            except Exception as error:
                if not isinstance(error, httpx2.HTTPError) and not self._closed:
                    raise
                failure = f"{type(error).__name__}: {error}"
                if repeatable or isinstance(error, httpx2.ConnectError):
                    continue
                break
            if response.status_code not in _BUSY:
                return self._read(response, what)
            failure = f"busy (HTTP {response.status_code})"
        raise EngineDown(f"{self.name}: {what}: {failure}")

    def _read(self, response: httpx2.Response, what: str) -> Any:
        if response.status_code >= 400:
            text = f"{self.name}: {what}: HTTP {response.status_code}: {response.text[:_SHOWN]}"
            raise (RequestRefused if response.status_code < 500 else EngineDown)(text)
        if not response.content:
            return None
        try:
            return json.loads(response.content)
        except ValueError:
            start = response.text[:_SHOWN]
            raise BadResponse(f"{self.name}: {what}: the answer is not JSON: {start!r}") from None

    async def close(self) -> None:
        """Close the connections; calls that still wait raise EngineDown."""
        self._closed = True
        await self._http.aclose()
