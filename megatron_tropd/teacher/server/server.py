"""One SGLang server that holds the teacher: whether it fits this run, and its scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_tropd.json_files import shown
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.sglang.api.control import ServerInfo, read_model_type
from megatron_tropd.sglang.api.scores import check_prompt, read_at, read_given, read_top, score_body
from megatron_tropd.sglang.errors import RequestRefused, UnfitServer
from megatron_tropd.sglang.server.balanced import AskedServer
from megatron_tropd.sglang.server.handle import ServerHandle
from megatron_tropd.sglang.settings import ServerSettings
from megatron_tropd.teacher.server.top_k import SPARE, cut_top_k
from megatron_tropd.types import Rollout, TeacherScores


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherModel:
    """What a server must hold, and what is asked of it."""

    arch: Architecture
    model_type: str
    """Of its config.json."""
    common_vocab_size: int
    """Ids from here on are in no top-k."""
    longest: int
    """Tokens of the longest sequence of the run."""


class TeacherServer(AskedServer):
    """Server number ``index`` of the teacher.

    Errors of every method that asks: EngineDown, RequestRefused, BadResponse, naming the server and the work.
    """

    def __init__(
        self, index: int, settings: ServerSettings, model: TeacherModel, server: ServerHandle | None, url: str = "",
        behind: Sequence[TeacherServer] = (),
    ) -> None:  # fmt: skip
        super().__init__(index, settings, server, url, behind)
        self._model = model

    def move_to(self, url: str, starts: int) -> None:
        """Take the address of the last start, which another rank made; :meth:`start` then connects to it."""
        self._url, self.starts = url, starts - 1

    # ---- whether it fits ----

    async def _learn(self) -> None:
        """Ask the server what it is, and check that it is this run's teacher, as far as SGLang tells."""
        await super()._learn()
        with self._named("/model_info"):
            model_type = read_model_type(await self._get("/model_info"))
        if model_type != self._model.model_type:
            raise UnfitServer(
                f"{self.name} holds a model of type {shown(model_type)}, --teacher-hf-checkpoint one of type "
                f"{self._model.model_type}: start it with that checkpoint"
            )
        await self._check_rows()

    def _take_info(self, info: ServerInfo) -> None:
        super()._take_info(info)
        if info.max_input < self._model.longest:
            raise UnfitServer(
                f"{self.name} takes sequences of {info.max_input} tokens, --max-prompt-length + --max-response-length "
                f"are {self._model.longest}: raise {self._settings.names.prefix}max-total-tokens and "
                f"{self._settings.names.prefix}context-length, or lower those"
            )

    async def _check_rows(self) -> None:
        """SGLang does not tell the size of the vocabulary, but refuses an id from there on."""
        rows = self._model.arch.vocab_size
        for token, fits in ((rows - 1, True), (rows, False)):
            body = score_body([0, 0], ids=[token])
            try:
                await self._ask(body, f"scoring of id {token}")
                taken = True
            except RequestRefused:
                taken = False
            if taken is not fits:
                raise UnfitServer(
                    f"{self.name} {'takes' if taken else 'refuses'} token id {token}; the model of "
                    f"--teacher-hf-checkpoint has {rows} ids: start the server with that checkpoint"
                )

    # ---- scores ----

    async def score(self, rollout: Rollout, top_k: int) -> TeacherScores:
        """Score the response of ``rollout``: log-probabilities of all its tokens, top-k of those the student wrote."""
        what = f"prompt {rollout.prompt_uid}, sample {rollout.sample_index}"
        rows, common = self._model.arch.vocab_size, self._model.common_vocab_size
        asked = min(top_k + SPARE, rows) if top_k and rollout.logprobs else 0
        found = await self._score(rollout, asked, top_k, what)
        if found is None:  # ids beyond the common vocabulary took their places
            found = await self._score(rollout, min(top_k + rows - common, rows), top_k, what)
            assert found is not None, "more than all others cannot be in the way"
        return found

    async def _score(self, rollout: Rollout, asked: int, top_k: int, what: str) -> TeacherScores | None:
        """Ask for ``asked`` ids per position; None where fewer than ``top_k`` of them are common ids."""
        start, rows = rollout.prompt_len - 1, self._model.arch.vocab_size
        answer = await self._ask(score_body(rollout.token_ids, start=start, top_k=asked), what)
        with self._named(what):
            logprob = torch.tensor(read_given(answer, rollout.token_ids, start=start, num_rows=rows))
            foreign = torch.tensor(rollout.token_ids[rollout.prompt_len :]) >= self._model.common_vocab_size
            scores = TeacherScores(
                logprob=logprob.masked_fill(foreign, -torch.inf),
                topk_ids=torch.empty(0, top_k, dtype=torch.int32) if top_k else None,
                topk_logprobs=torch.empty(0, top_k) if top_k else None,
            )
            if not asked:
                return scores
            ids, values = read_top(answer, num_tokens=rollout.response_len, top_k=asked, num_rows=rows)
        written = slice(rollout.guidance_len, None)
        cut = cut_top_k(ids[written], values[written], top_k=top_k, vocab_size=self._model.common_vocab_size)
        if cut is None:
            return None
        return TeacherScores(logprob=scores.logprob, topk_ids=cut[0], topk_logprobs=cut[1])

    async def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of every token but the first, over all rows of the model."""
        what = f"scoring of {len(token_ids)} tokens"
        answer = await self._ask(score_body(token_ids), what)
        with self._named(what):
            return list(read_given(answer, token_ids, start=0, num_rows=self._model.arch.vocab_size))

    async def logprobs_at(self, token_ids: Sequence[int], ids: Sequence[int], start: int = 0) -> torch.Tensor:
        """Log-probabilities of ``ids`` as the token at every place after ``start``, float32 [places, len(ids)].

        SGLang takes one list of ids for a request, which is for all its positions, and refuses an id that the model
        does not have.  The answer is nested lists, some 30 bytes for each number.
        """
        what = f"log-probabilities of {len(ids)} ids after {len(token_ids)} tokens"
        answer = await self._ask(score_body(token_ids, start=start, ids=ids), what)
        with self._named(what):
            check_prompt(answer, token_ids)
            return torch.from_numpy(read_at(answer, ids, num_tokens=len(token_ids) - 1 - start))
