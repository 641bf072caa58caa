"""The teacher's side of dedicated placement: ranks that score what arrives until they are told to stop.

All of the teacher's ranks run the same loop; its first rank reads the mailbox and tells the others.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from torch import Tensor

from megatron_tropd.parallel.bridge import Bridge
from megatron_tropd.parallel.exchange import broadcast_object, exchange
from megatron_tropd.parallel.fail_together import reason_of
from megatron_tropd.parallel.mailbox import Mailbox, Message
from megatron_tropd.teacher.dedicated.messages import layout_of, pairs, read_score
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.teacher.output_table import Grid
from megatron_tropd.teacher.routing import flatten, payloads
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores

_GATHER_S = 0.05
"""Rollouts that reach an idle teacher and do not fill its micro-batches wait so long for others."""
_ROUND_S = 20.0
"""The other ranks wait in a collective for what the first one reads; it tells them so often that there is nothing."""


@dataclass(slots=True, kw_only=True)
class _Batch:
    """A batch of rollouts as far as it arrived."""

    want: ScoreRequest
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    waiting: dict[int, Rollout] = field(default_factory=dict)
    """Those that are not scored yet."""
    scores: dict[int, TeacherScores] = field(default_factory=dict)
    """What this rank holds, as in ``Located``."""
    sources: dict[int, int] = field(default_factory=dict)
    """Rank in the teacher's world that sends each rollout's scores."""
    topk_rows: dict[int, int] = field(default_factory=dict)
    """As in ``Located``."""
    failure: str = ""


class Worker:
    """Scores for the trainer.  Every method is collective over the teacher's ranks.

    Args:
        model: on all of the teacher's ranks.
        inbox, outbox: on its first rank, None elsewhere.
        bridge: to the trainer's ranks.
        first: rank in the job of the teacher's first rank.
    """

    def __init__(
        self, model: MegatronTeacher, inbox: Mailbox | None, outbox: Mailbox | None, bridge: Bridge, *, first: int
    ) -> None:
        self._model, self._inbox, self._outbox, self._bridge, self._first = model, inbox, outbox, bridge, first
        self._batches: dict[int, _Batch] = {}
        self._busy_s = 0.0
        self._stopped_by = ""
        self._since = time.perf_counter()

    def serve(self) -> str:
        """Answer messages until ``stop``; return what asked the run to stop, nothing where it came to its end."""
        self._reply(Message(kind="ready"))
        was_idle = True  # what came while it scored has waited long enough
        while True:
            waiting = [batch for batch in self._batches.values() if batch.waiting]
            if any(self._fills(batch) for batch in waiting):
                self._score(waiting[0])
                was_idle = False
                continue
            message = self._next((_GATHER_S if waiting else _ROUND_S) if was_idle else 0.0)
            if message is None:
                was_idle = not waiting
                if waiting:
                    self._score(waiting[0])
            elif message.kind == "stop":
                self._reply(Message(kind="stopped"))
                return self._stopped_by
            else:
                self._answer(message)

    def _next(self, timeout_s: float) -> Message | None:
        message: Message | None = broadcast_object(self._inbox.take(timeout_s) if self._inbox else None)
        return message

    def _reply(self, message: Message) -> None:
        if self._outbox is not None:
            self._outbox.post(message)

    def _answer(self, message: Message) -> None:
        values = message.values
        if message.kind == "score":
            step, rollouts, want = read_score(message)
            batch = self._batches.setdefault(step, _Batch(want=want))
            batch.rollouts |= rollouts
            batch.waiting |= rollouts
        elif message.kind == "deliver":
            self._deliver(values["step"], dict(values["targets"]), self._batches.pop(values["step"], None))
        elif message.kind == "logprobs":
            self._logprobs(values["sequences"], values["vocab_size"])
        elif message.kind == "table":
            student = Grid(layout=layout_of(values), first=values["first"])
            self._model.output_rows(student, values["padded_vocab_size"], first=self._first, link=self._bridge)
        elif message.kind == "stopping":
            self._stopped_by = values["why"]
        else:
            raise ValueError(f"the trainer asked for {message.kind!r}, which a teacher does not know")

    def _fills(self, batch: _Batch) -> bool:
        """Whether what waits fills a micro-batch of every replica."""
        tokens = sum(len(rollout.token_ids) for rollout in batch.waiting.values())
        return tokens >= self._model.max_tokens * self._model.layout.dp

    def _score(self, batch: _Batch) -> None:
        """Score what waits; a failure is kept for the trainer, which asks for the batch later."""
        rollouts, batch.waiting = batch.waiting, {}
        started = time.perf_counter()
        try:
            located = self._model.score_here(rollouts, batch.want)
        except ValueError as error:  # on every rank alike
            batch.failure = batch.failure or reason_of(error)
        else:
            batch.scores |= located.scores
            batch.sources |= located.sources
            batch.topk_rows |= located.topk_rows
        self._busy_s += time.perf_counter() - started

    def _deliver(self, step: int, targets: dict[int, int], batch: _Batch | None) -> None:
        """Score the rest of the batch and send every score to its target."""
        if batch and batch.waiting:
            self._score(batch)
        if batch is None or batch.rollouts.keys() != targets.keys() or batch.failure:
            missing = f"{len(batch.rollouts) if batch else 0} of {len(targets)} rollouts arrived"
            reason = (batch and batch.failure) or missing
            self._reply(Message(kind="failed", values={"reason": f"step {step + 1}: {reason}"}))
            return
        now = time.perf_counter()
        measured = {"busy_s": self._busy_s, "total_s": now - self._since}
        self._busy_s, self._since = 0.0, now
        sources = {index: self._first + batch.sources[index] for index in targets}
        values = {"sources": pairs(sources), "topk_rows": pairs(batch.topk_rows), **measured}
        self._reply(Message(kind="scored", values=values))
        send: dict[int, list[int]] = defaultdict(list)
        for index, target in targets.items():
            if sources[index] == self._bridge.rank:
                send[target].append(index)
        specs = payloads(batch.rollouts, batch.want, self._model.hidden_like, batch.topk_rows)
        tensors: dict[int, list[Tensor]] = {t: flatten(batch.scores, indices, specs) for t, indices in send.items()}
        exchange(tensors, {}, self._bridge)

    def _logprobs(self, sequences: list[list[int]], vocab_size: int) -> None:
        try:
            found = self._model.logprobs_of(sequences, vocab_size=vocab_size)
        except ValueError as error:  # on every rank alike
            self._reply(Message(kind="failed", values={"reason": reason_of(error)}))
        else:
            self._reply(Message(kind="logprobs", values={"found": found}))
