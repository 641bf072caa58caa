"""HTTP to one server, with deadlines, bounded retries and typed errors."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import httpx2

from megatron_tropd.json_files import shown
from megatron_tropd.sglang.errors import BadResponse, EngineDown, EngineTimeout, NoConnection, RequestRefused
from megatron_tropd.sglang.settings import REQUEST_TIMEOUT_FLAG, Keys

_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 60.0
"""Of a Retry-After that is longer no more is kept: the caller's deadline may be hours away."""
_BUSY = frozenset({429, 503})
_SHOWN = 600
MAX_ANSWER_BYTES = 1 << 30
"""A server that has lost its mind must not fill this host's memory: the longest answer has some 100 MB."""


class Client:
    """Requests to one server.  ``name`` opens every error message.

    A request is repeated, a few times and ever later, when no connection could be made, when the server
    is busy (429, 503; not before its Retry-After), and, if it is ``repeatable``, when the connection broke; not when
    ``is_running`` says that there is nothing to connect to.  Other 4xx and 5xx are final.

    Raises (every method):
        RequestRefused: 4xx but 429.
        EngineTimeout: no answer within the deadline, retries included; the message names the flag.
        EngineDown: 5xx, and 429 or 503 after the last attempt.
        NoConnection: there was none after the last attempt.
        BadResponse: the answer is not JSON, too long, or neither success nor an error.
    """

    def __init__(self, name: str, url: str, keys: Keys | None, is_running: Callable[[], bool] = lambda: True) -> None:
        self.name, self.url, self._keys, self._is_running = name, url, keys, is_running
        self._closed = False
        self.received_bytes = 0
        """Bytes of all answers so far, without headers."""
        # trust_env=False: a proxy of the environment must not see tokens, weights or keys.
        # No cookies: one that cannot be sent back would make every later request fail.
        self._http = httpx2.AsyncClient(
            base_url=url, timeout=None, trust_env=False, limits=httpx2.Limits(max_connections=None),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )  # fmt: skip

    async def get(self, path: str, *, timeout_s: float | None) -> Any:
        """Ask for ``path``; ``timeout_s`` as in :meth:`post`."""
        return await self._call("GET", path, None, what=path, timeout_s=timeout_s, repeatable=True, admin=False)

    async def post(
        self, path: str, body: dict[str, Any] | bytes, *, what: str, timeout_s: float | None,
        repeatable: bool = False, admin: bool = True,
    ) -> Any:  # fmt: skip
        """Send JSON, or bytes that are JSON already.

        Args:
            path: of the endpoint.
            body: an empty dict where the endpoint wants none.
            what: names the work in error messages (step, prompts, tensors).
            timeout_s: for all attempts together; None where the caller ends the call (:class:`ProgressWatch`).
            repeatable: sending twice does no harm.
            admin: authorize with the admin key; generation takes the other one.
        """
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self._call("POST", path, data, what=what, timeout_s=timeout_s, repeatable=repeatable, admin=admin)

    async def _call(
        self, method: str, path: str, data: bytes | None, *, what: str, timeout_s: float | None, repeatable: bool,
        admin: bool,
    ) -> Any:  # fmt: skip
        deadline, failures = asyncio.timeout(timeout_s), list[str]()
        try:
            async with deadline:
                return await self._attempts(method, path, data, what, repeatable, admin, failures)
        except TimeoutError:
            if not deadline.expired():
                raise
            seen = f" (before: {failures[-1]})" if failures else ""
            raise EngineTimeout(
                f"{self.name}: {what}: no answer within {timeout_s:g} s{seen}; if the server was only slow, raise "
                f"{REQUEST_TIMEOUT_FLAG}"
            ) from None

    async def _attempts(
        self, method: str, path: str, data: bytes | None, what: str, repeatable: bool, admin: bool, failures: list[str]
    ) -> Any:
        """Send a request until it is answered; ``failures`` receives what went wrong before."""
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if self._keys is not None:
            headers["authorization"] = f"Bearer {self._keys.admin if admin else self._keys.api}"
        kind, asked_for = EngineDown, 0.0
        for attempt in range(_ATTEMPTS):
            if attempt:
                pause = _FIRST_PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                await asyncio.sleep(max(pause, min(asked_for, _LONGEST_PAUSE_S)))
            if self._closed or not self._is_running():
                failures = failures or ["it does not run"]
                break
            try:
                status, content, asked_for = await self._exchange(method, path, data, headers, what)
            except Exception as error:
                if not isinstance(error, httpx2.HTTPError) and not self._closed:
                    raise
                failures.append(f"{type(error).__name__}: {error}")
                kind, asked_for = NoConnection, 0.0
                if repeatable or isinstance(error, httpx2.ConnectError):
                    continue
                break
            if status not in _BUSY:
                return self._read(status, content, what)
            failures.append(f"busy (HTTP {status})")
            kind = EngineDown
        raise kind(f"{self.name}: {what}: {failures[-1]}")

    async def _exchange(
        self, method: str, path: str, data: bytes | None, headers: dict[str, str], what: str
    ) -> tuple[int, bytes, float]:
        """Send a request once; return status and content of the answer, and the seconds of its Retry-After."""
        content = bytearray()
        async with self._http.stream(method, path, content=data, headers=headers) as response:
            async for piece in response.aiter_bytes():
                content += piece
                self.received_bytes += len(piece)
                if len(content) > MAX_ANSWER_BYTES:
                    raise BadResponse(f"{self.name}: {what}: the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return response.status_code, bytes(content), _seconds(response.headers.get("retry-after", ""))

    def _read(self, status: int, content: bytes, what: str) -> Any:
        if status >= 400:
            text = f"{self.name}: {what}: HTTP {status}: {_beginning(content)}"
            raise RequestRefused(text, status=status) if status < 500 else EngineDown(text)
        if status >= 300:
            raise BadResponse(f"{self.name}: {what}: HTTP {status} is neither success nor an error")
        if not content:
            return None
        try:
            return json.loads(content, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = f"{shown(str(error))}: {_beginning(content)!r}"
            raise BadResponse(f"{self.name}: {what}: the answer is not JSON: {reason}") from None

    async def close(self) -> None:
        """Close the connections; calls that still wait raise EngineDown."""
        self._closed = True
        await self._http.aclose()


def _seconds(text: str) -> float:
    """Return the seconds of a Retry-After; 0 for one that is a date, or nothing."""
    return float(text) if text.isdecimal() and text.isascii() and len(text) < 10 else 0.0


def _beginning(content: bytes) -> str:
    """The beginning of an answer.  Its own charset is not asked for: it may name any codec of Python."""
    return content[:_SHOWN].decode(errors="replace")


def _refuse_constant(name: str) -> None:
    """NaN, Infinity and -Infinity, which Python reads but JSON does not have."""
    raise ValueError(f"it has the number {name}")
