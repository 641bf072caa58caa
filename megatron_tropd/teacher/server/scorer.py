"""A teacher on SGLang servers: rollouts are scored as they finish, while others are still written."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.exchange import broadcast_object
from megatron_tropd.parallel.fail_together import from_all_ranks, is_rank_zero, on_rank_zero
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.sglang.loop_thread import LoopThread
from megatron_tropd.sglang.server.handle import MakeServer
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import ServerSettings
from megatron_tropd.teacher.routing import payloads, route
from megatron_tropd.teacher.scorer import Destination, ScorerError
from megatron_tropd.teacher.server.fleet import Suspicion, TeacherFleet
from megatron_tropd.teacher.server.server import TeacherModel, TeacherServer
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores

log = logging.getLogger(__name__)

T = TypeVar("T")

_ROUND_S = 5.0
"""Ranks meet at least so often while they wait: a rank that found a server dead needs rank 0 to start it anew, and a
collective has a timeout."""
_MAX_FOREIGN_MASS = 1e-4
"""Probability that the model may give to ids beyond the common vocabulary.  The server's log-probabilities are over all
ids, those of a teacher in the trainer over the common ones: they differ by -log(1 - mass)."""
_IDS_PER_REQUEST = 2048
_MOST_REFERENCE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """What a rank tells the others while all wait for scores."""

    held: tuple[int, ...] | None
    """Rollouts whose scores are here; None while some are still asked for."""
    suspicions: Mapping[int, Suspicion] = field(default_factory=dict)
    num_tokens: int = 0
    received_bytes: int = 0
    retries: int = 0


def _mean_gap(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> float:
    """Return the mean absolute difference of two accounts of the same texts, in nats."""
    gaps = [abs(a - b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True)]
    return sum(gaps) / max(len(gaps), 1)


class ServerScorer:
    """Implements Scorer with SGLang servers.  Making it starts them, and does not wait.  Collective.

    Args:
        settings: of the servers; rank 0 starts them, or finds them at ``settings.urls``.
        model: what they must hold.
        agreement: largest accepted mean difference, in nats, of the scores that two of them give one text.
        make_server: makes a server that is started.

    Raises:
        ScorerError: on every rank: a server process cannot be started.
    """

    def __init__(
        self, settings: ServerSettings, model: TeacherModel, *, agreement: float,
        make_server: MakeServer = ServerProcess,
    ) -> None:  # fmt: skip
        self._model, self._agreement = model, agreement
        self._loop = LoopThread("teacher-servers")
        self._fleet = TeacherFleet(settings, model, owns=is_rank_zero(), make_server=make_server)
        self._asked: dict[int, dict[int, concurrent.futures.Future[TeacherScores]]] = {}
        self._measured: dict[str, float] = {}
        self._num_tokens, self._bytes_of_checks = 0.0, 0
        self._reference: tuple[Sequence[int], list[float]] | None = None
        """A text and its log-probabilities, by which a server is known as the one of the start; on rank 0."""
        self._closed = False
        self.on_scored: Callable[[int, int, Rollout, ScoreRequest, TeacherScores], object] | None = None
        """Called in another thread with step, index and scores of each rollout of this rank's when they are there."""
        on_rank_zero(lambda: self._loop.run(self._fleet.open()), ScorerError)
        self._share_states()

    @property
    def hidden_like(self) -> Tensor | None:
        """None: SGLang sends no hidden states of given tokens."""
        return None

    # ---- scores ----

    def submit(self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> None:
        """See Scorer."""
        assert not want.entropy and not want.hidden, "refused before the run starts"
        asked = self._asked.setdefault(step, {})
        for index, rollout in rollouts.items():
            asked[index] = self._loop.begin(self._score(rollout, want))
            if self.on_scored is not None:
                asked[index].add_done_callback(partial(_hand_on, partial(self.on_scored, step, index, rollout, want)))

    async def _score(self, rollout: Rollout, want: ScoreRequest) -> TeacherScores:
        if not rollout.response_len:
            return TeacherScores(
                logprob=torch.empty(0),
                topk_ids=torch.empty(0, want.top_k, dtype=torch.int32) if want.top_k else None,
                topk_logprobs=torch.empty(0, want.top_k) if want.top_k else None,
            )
        return await self._fleet.ask(len(rollout.token_ids), lambda server: server.score(rollout, want.top_k))

    def scores(
        self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """See Scorer."""
        started = time.perf_counter()
        asked = self._asked.pop(step, {})
        try:
            last = self._wait_for_all(asked)
        finally:
            for future in asked.values():
                future.cancel()
        sources = {index: rank for rank, found in enumerate(last) for index in found.held or ()}
        if sources.keys() != rollouts.keys():
            raise ScorerError(f"{len(sources)} of the {len(rollouts)} rollouts of step {step + 1} were submitted")
        self._measure(last, time.perf_counter() - started)
        self._on_rank_zero(lambda: self._check_same_model(step))
        scored = {index: future.result() for index, future in asked.items()}
        return route(scored, sources, rollouts, payloads(rollouts, want, None, {}), destination)

    def _wait_for_all(self, asked: Mapping[int, concurrent.futures.Future[TeacherScores]]) -> list[_Round]:
        """Wait until every rank has its scores; return what the ranks told in the last round.  Collective."""
        while True:
            found = from_all_ranks(lambda: self._round(asked), ScorerError)
            if all(each.held is not None for each in found):
                return found
            self._check_suspicions({index: each for part in found for index, each in part.suspicions.items()})
            self._share_states()

    def _round(self, asked: Mapping[int, concurrent.futures.Future[TeacherScores]]) -> _Round:
        """Wait for this rank's scores, a while."""
        done, waiting = concurrent.futures.wait(
            asked.values(), timeout=_ROUND_S, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        for future in done:
            error = future.exception()
            if isinstance(error, EngineError):
                raise ScorerError(f"the teacher's servers: {error}") from error
            if error is not None:
                raise error
        if waiting:
            return _Round(held=None, suspicions=self._fleet.take_suspicions())
        return _Round(
            held=tuple(asked),
            num_tokens=sum(len(future.result().logprob) for future in asked.values()),
            received_bytes=self._received_bytes() - self._bytes_of_checks,
            retries=self._fleet.counts["retries"],
        )

    def _check_suspicions(self, suspicions: Mapping[int, Suspicion]) -> None:
        on_rank_zero(lambda: self._loop.run(self._fleet.check(suspicions)), ScorerError)

    def _share_states(self) -> None:
        """Tell every rank where the servers are.  Collective."""
        states = broadcast_object(self._fleet.states())
        if not is_rank_zero():
            self._loop.run(self._fleet.adopt(states))

    def _measure(self, last: Sequence[_Round], wait_s: float) -> None:
        tokens = float(sum(each.num_tokens for each in last))
        self._num_tokens += tokens
        self._measured = {
            "wait_s": wait_s,
            "scored_tokens": tokens,
            "bytes_per_token": sum(each.received_bytes for each in last) / max(self._num_tokens, 1.0),
            "retries": float(sum(each.retries for each in last)),
            "restarts": float(self._fleet.counts["restarts"]),
        }

    def _received_bytes(self) -> int:
        return sum(server.received_bytes for server in self._asked_servers())

    def _asked_servers(self) -> list[TeacherServer]:
        """The servers, and the router that stands before them."""
        return [*self._fleet.servers, *filter(None, (self._fleet.router,))]

    # ---- checks at the start ----

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """See Scorer; every server scores them, and they must agree."""
        rows = self._model.arch.vocab_size
        if vocab_size != rows:
            raise ScorerError(f"log-probabilities over {vocab_size} ids were asked for; servers have them over {rows}")
        self._on_rank_zero(self._fleet.until_up)
        self._share_states()
        found: list[list[float]] = self._on_rank_zero(lambda: self._checked_logprobs(sequences))
        self._bytes_of_checks = self._received_bytes()
        self._reference = next(
            (pair for pair in zip(sequences, found, strict=True) if 2 <= len(pair[0]) <= _MOST_REFERENCE_TOKENS), None
        )
        return found

    async def _checked_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        by_server = []
        for server in self._asked_servers():  # a router before other servers is found as well
            if not server.given_up:
                by_server.append((server.name, [await server.logprobs(sequence) for sequence in sequences]))
        name, first = by_server[0]
        for other, values in by_server[1:]:
            if (gap := _mean_gap(first, values)) > self._agreement:
                raise EngineError(
                    f"{name} and {other} give the same text log-probabilities that differ by {gap:.3g} nats on "
                    f"average, above --parity-limit {self._agreement:g}: they hold different models, or one is damaged"
                )
        await self._check_foreign_mass(sequences)
        return first

    async def _check_same_model(self, step: int) -> None:
        """Raises EngineError unless every server that is up still holds the model of the start.

        What a server that was started anew by somebody holds is not told by its answers, so the scores of a batch are
        used only after this.
        """
        if self._reference is None:
            return
        sequence, expected = self._reference
        before = self._received_bytes()
        asked = [server for server in self._fleet.servers if server.is_up]
        answers = await asyncio.gather(*(server.logprobs(sequence) for server in asked), return_exceptions=True)
        self._bytes_of_checks += self._received_bytes() - before
        for server, found in zip(asked, answers, strict=True):
            if isinstance(found, EngineError):  # what it scored came before; the next request finds it down
                log.warning("not checked after step %d: %s", step + 1, found)
            elif isinstance(found, BaseException):
                raise found
            elif not (gap := _mean_gap([expected], [found])) <= self._agreement:
                raise EngineError(
                    f"{server.name}: after step {step + 1} its log-probabilities of a text differ by {gap:.3g} nats on "
                    f"average from those at the start, above --parity-limit {self._agreement:g}: it was started anew "
                    "with another model, or is damaged. The scores of this step are not used"
                )

    async def _check_foreign_mass(self, sequences: Sequence[Sequence[int]]) -> None:
        common, rows = self._model.common_vocab_size, self._model.arch.vocab_size
        total, count = 0.0, 0
        for sequence in sequences if common < rows else ():
            for first in range(common, rows, _IDS_PER_REQUEST):
                ids = range(first, min(first + _IDS_PER_REQUEST, rows))
                total += float((await self._logprobs_at(sequence, ids)).double().exp().sum())
            count += len(sequence) - 1
        mass = total / max(count, 1)
        if not mass <= _MAX_FOREIGN_MASS:
            raise EngineError(
                f"the teacher gives {mass:.3g} of its probability to the {rows - common} ids from {common} on, which "
                f"the student does not have; expected at most {_MAX_FOREIGN_MASS:g}. Its servers compute "
                "log-probabilities over all ids, so every score would be too low: use --teacher-placement colocated, "
                "which leaves these ids out"
            )

    async def _logprobs_at(self, token_ids: Sequence[int], ids: Sequence[int]) -> Tensor:
        return await self._fleet.ask(len(token_ids), lambda server: server.logprobs_at(token_ids, ids))

    def _on_rank_zero(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await ``work`` on rank 0, however long it takes; return its result on every rank.  Collective."""
        future = self._loop.begin(work()) if is_rank_zero() else None

        def look() -> tuple[bool, Any]:
            assert future is not None
            try:
                return True, future.result(_ROUND_S)
            except TimeoutError:
                if future.done():
                    raise
                return False, None
            except EngineError as error:
                raise ScorerError(f"the teacher's servers: {error}") from error

        while True:
            ended, value = on_rank_zero(look, ScorerError)
            if ended:
                return value  # type: ignore[no-any-return]

    # ---- the rest ----

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """See Scorer; a server gives none."""
        raise ScorerError("--teacher-placement server has no output table to give")

    def metrics(self) -> dict[str, float]:
        """See Scorer: ``wait_s`` and ``scored_tokens`` of the last batch; ``bytes_per_token``, ``retries`` and
        ``restarts`` of the launch so far."""
        return dict(self._measured)

    def close(self) -> None:
        """Stop the servers that were started here.  May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._loop.run(self._fleet.close())
        self._loop.close()


def _hand_on(use: Callable[[TeacherScores], object], future: concurrent.futures.Future[TeacherScores]) -> None:
    if not future.cancelled() and future.exception() is None:
        use(future.result())
