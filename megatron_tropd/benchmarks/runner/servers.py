"""Several servers of one model as one model of evalscope."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from evalscope.api.model import GenerateConfig, ModelAPI, ModelOutput
from evalscope.models.openai_compatible import OpenAICompatibleAPI
from evalscope.models.utils.openai import EmptyCompletionError
from openai import APIConnectionError, APIError, APIStatusError, APITimeoutError, InternalServerError

_ATTEMPTS = 3
"""Of one request at one server, before another server is asked; one where it takes too long."""
_PAUSE_S = 1


class RefusedRequest(RuntimeError):
    """A server refused a request that would be refused again."""


class NoServerLeft(RuntimeError):
    """Every server is dead, or failed at this request; the message says how."""


class _Server(OpenAICompatibleAPI):
    """One server.  A refused request is an error: evalscope would take its message for the model's answer."""

    def handle_bad_request(self, ex: APIStatusError) -> ModelOutput:
        raise RefusedRequest(f"{self.base_url} refused a request: HTTP {ex.status_code}: {ex.message}") from ex

    def ask(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """Return the response; an error is repeated here, because evalscope would repeat a timeout too."""
        once = config.model_copy(update={"retries": 1})
        for _ in range(_ATTEMPTS - 1):
            try:
                return self.generate(input, tools, tool_choice, once)
            except APITimeoutError:
                raise
            except (APIError, EmptyCompletionError):
                time.sleep(_PAUSE_S)
        return self.generate(input, tools, tool_choice, once)


class BalancedServers(ModelAPI):
    """Asks the server with the fewest requests in flight, and another one where that one fails.

    A server that does not answer, or not in time, is dead: no later request is sent to it.

    Args:
        urls: ``http://host:port`` of each.
        model: what the servers call the model.
        key: of their API; "" for none.
        config: sampling, sent with every request.
    """

    def __init__(self, urls: Sequence[str], model: str, key: str, config: GenerateConfig) -> None:
        super().__init__(model_name=model, config=config)
        # trust_env of the HTTP client would send prompts through a proxy of the environment: launch.py's parent removes
        # those variables.  max_retries=0: the client would repeat a timeout.
        self._servers = [
            _Server(model_name=model, base_url=f"{url}/v1", api_key=key or "none", config=config, max_retries=0)
            for url in urls
        ]
        self._lock = threading.Lock()
        self._in_flight = [0] * len(self._servers)
        self._dead: dict[int, str] = {}
        """Index of a server -> why."""

    def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """See ModelAPI.  Raises NoServerLeft, or RefusedRequest if a server refuses."""
        failed: dict[int, str] = {}
        while True:
            index = self._take(failed)
            try:
                return self._servers[index].ask(input, tools, tool_choice, config)
            except (APIConnectionError, InternalServerError) as error:
                # An error that a server answers with may be this request's own: the server is left for others.
                place = self._dead if isinstance(error, APIConnectionError) else failed
                with self._lock:
                    place[index] = f"{self._servers[index].base_url}: {type(error).__name__}: {error}"
            finally:
                with self._lock:
                    self._in_flight[index] -= 1

    def _take(self, failed: Mapping[int, str]) -> int:
        with self._lock:
            without = {**self._dead, **failed}
            left = [index for index in range(len(self._servers)) if index not in without]
            if not left:
                raise NoServerLeft("no server is left; " + "; ".join(without.values()))
            index = min(left, key=self._in_flight.__getitem__)
            self._in_flight[index] += 1
            return index
