"""Several servers of one model as one model of evalscope."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from evalscope.api.model import GenerateConfig, ModelAPI, ModelOutput
from evalscope.models.openai_compatible import OpenAICompatibleAPI
from openai import APIConnectionError, APIStatusError, InternalServerError

_ATTEMPTS = 3
"""Of one request at one server, before another server is asked."""
_PAUSE_S = 1


class RefusedRequest(RuntimeError):
    """A server refused a request that would be refused again."""


class _Server(OpenAICompatibleAPI):
    """One server.  A refused request is an error: evalscope would take its message for the model's answer."""

    def handle_bad_request(self, ex: APIStatusError) -> ModelOutput:
        raise RefusedRequest(f"{self.base_url} refused a request: HTTP {ex.status_code}: {ex.message}") from ex


class BalancedServers(ModelAPI):
    """Asks the server with the fewest requests in flight, and another one where that one fails.

    Args:
        urls: ``http://host:port`` of each.
        model: what the servers call the model.
        key: of their API; "" for none.
        config: sampling, sent with every request.
    """

    def __init__(self, urls: Sequence[str], model: str, key: str, config: GenerateConfig) -> None:
        super().__init__(model_name=model, config=config)
        # trust_env of the HTTP client would send prompts through a proxy of the environment: launch.py's parent removes
        # those variables.  max_retries=0: evalscope repeats requests itself.
        self._servers = [
            _Server(model_name=model, base_url=f"{url}/v1", api_key=key or "none", config=config, max_retries=0)
            for url in urls
        ]
        self._in_flight = [0] * len(self._servers)
        self._lock = threading.Lock()

    def generate(self, input: Any, tools: Any, tool_choice: Any, config: GenerateConfig) -> ModelOutput:
        """See ModelAPI.  Raises what the last server raised if all fail, RefusedRequest if one refuses."""
        failed: set[int] = set()
        config = config.model_copy(update={"retries": _ATTEMPTS, "retry_interval": _PAUSE_S})
        while True:
            index = self._take(failed)
            try:
                return self._servers[index].generate(input, tools, tool_choice, config)
            except (APIConnectionError, InternalServerError):
                failed.add(index)
                if len(failed) == len(self._servers):
                    raise
            finally:
                with self._lock:
                    self._in_flight[index] -= 1

    def _take(self, failed: set[int]) -> int:
        with self._lock:
            index = min((i for i in range(len(self._servers)) if i not in failed), key=lambda i: self._in_flight[i])
            self._in_flight[index] += 1
            return index
