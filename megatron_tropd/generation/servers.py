"""SGLang servers that write responses with the weights of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tropd.generation.journal import Written
from megatron_tropd.generation.task import Task
from megatron_tropd.json_files import shown
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.rollout.sglang.api.generation import (
    PromptGroup,
    TokenRules,
    generate_body,
    read_answers,
    read_written,
)
from megatron_tropd.sglang.api.control import ServerInfo, read_model_type
from megatron_tropd.sglang.errors import UnfitServer
from megatron_tropd.sglang.server.balanced import AskedServer, BalancedFleet
from megatron_tropd.sglang.server.handle import MakeServer, ServerHandle
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import ServerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class WritingJob:
    """What the servers must hold, and how they write."""

    model_type: str
    """Of the checkpoint's config.json."""
    max_positions: int
    """Longest sequence of the model, in tokens."""
    longest_prompt: int
    """In tokens."""
    max_new_tokens: int
    rules: TokenRules
    params: SamplingParams
    """SGLang draws with random numbers of its own: seed and step are not used."""


class WritingServer(AskedServer):
    """Server number ``index``: started here (``server``), or running elsewhere (``url``)."""

    def __init__(
        self, index: int, settings: ServerSettings, job: WritingJob, server: ServerHandle | None, url: str = "",
        behind: Sequence[WritingServer] = (),
    ) -> None:  # fmt: skip
        super().__init__(index, settings, server, url, behind)
        self._job = job

    async def _learn(self) -> None:
        await super()._learn()
        with self._named("/model_info"):
            model_type = read_model_type(await self._get("/model_info"))
        if model_type != self._job.model_type:
            raise UnfitServer(
                f"{self.name} holds a model of type {shown(model_type)}, --hf-checkpoint one of type "
                f"{self._job.model_type}: start it with that checkpoint"
            )
        longest = self._job.longest_prompt + self._job.max_new_tokens
        if self.max_tokens < longest:
            raise UnfitServer(
                f"{self.name} completes sequences of {self.max_tokens} tokens; the longest prompt and "
                f"--max-response-length are {longest}: raise --sglang-max-total-tokens and --sglang-context-length, "
                "or lower --max-response-length"
            )

    def _check_dtype(self, info: ServerInfo) -> None:
        """Take any: a server that runs already may write in whichever it was started with."""

    async def write(self, task: Task) -> list[Written]:
        """Write the samples of one prompt.

        Raises:
            EngineDown, RequestRefused, BadResponse: naming server and prompt.
        """
        group = PromptGroup(
            indices=task.samples, token_ids=task.token_ids, max_new_tokens=self._job.max_new_tokens,
            prompt_uid=task.random_uid,
        )  # fmt: skip
        what = f"prompt {task.number}"
        answer = await self._ask(generate_body(group, self._job.params, self._job.rules, logprobs=False), what)
        with self._named(what):
            found = [read_written(each, group, self._job.rules) for each in read_answers(answer, group)]
        return [
            Written(number=task.number, sample=sample, token_ids=tuple(token_ids), finish=finish)
            for sample, (token_ids, finish) in zip(task.samples, found, strict=True)
        ]


class WritingFleet(BalancedFleet[WritingServer]):
    """All servers of the command."""

    def __init__(
        self, settings: ServerSettings, job: WritingJob, *, max_in_flight: int,
        make_server: MakeServer = ServerProcess,
    ) -> None:  # fmt: skip
        if settings.urls:
            servers = [WritingServer(i, settings, job, None, url.rstrip("/")) for i, url in enumerate(settings.urls)]
        else:
            handles = [make_server(settings, i, job.max_positions) for i in range(settings.num_servers)]
            servers = [WritingServer(i, settings, job, handle) for i, handle in enumerate(handles)]
        router = None
        if settings.router_url:
            router = WritingServer(len(servers), settings, job, None, settings.router_url.rstrip("/"), behind=servers)
        super().__init__(settings, servers, router=router, max_in_flight=max_in_flight)
        self._job = job

    @property
    def room(self) -> int:
        """Prompts to have in hand: twice what the servers write at one time."""
        return 2 * self._max_in_flight * len(self.servers)

    async def write(self, task: Task) -> list[Written]:
        """Write the samples of one prompt on the server with the least to do.

        Raises:
            RequestRefused, EngineError: see :meth:`BalancedFleet.ask`.
        """
        num_tokens = len(task.token_ids) + len(task.samples) * self._job.max_new_tokens
        return await self.ask(num_tokens, lambda server: server.write(task))
