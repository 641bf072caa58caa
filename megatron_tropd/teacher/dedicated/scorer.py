"""The trainer's side of dedicated placement: rollouts go to the teacher's ranks as they finish and come back scored."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_tropd.parallel.bridge import Bridge
from megatron_tropd.parallel.exchange import exchange
from megatron_tropd.parallel.fail_together import is_rank_zero, on_rank_zero
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.mailbox import Mailbox, Message
from megatron_tropd.parallel.roles import Job, another_connection
from megatron_tropd.teacher.dedicated.messages import (
    deliver_message,
    inbox,
    outbox,
    score_message,
    table_message,
)
from megatron_tropd.teacher.output_table import Grid, reshard_output_table
from megatron_tropd.teacher.routing import bytes_per_token, payloads, share, unflatten
from megatron_tropd.teacher.scorer import Destination, ScorerError
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores

_ROUND_S = 20.0
"""The other ranks learn at least so often that the first one still waits; a collective has a timeout."""
_STOP_S = 60.0


class DedicatedScorer:
    """Implements Scorer with a model on ranks of its own.

    Making it waits until the teacher is loaded.  Collective over the trainer's ranks.

    Args:
        job: of this process.
        teacher: name of the teacher's role.
        layout: of the teacher.
        hidden_like: empty tensor [0, H] with the width and dtype of its hidden states.
        padded_vocab_size: rows of its output table, padding included.
        vocab_size: number of ids that all models share.
        timeout_s: of one message.
    """

    def __init__(
        self, job: Job, teacher: str, layout: ParallelLayout, *, hidden_like: Tensor, padded_vocab_size: int,
        vocab_size: int, timeout_s: float,
    ) -> None:  # fmt: skip
        self._layout, self._first = layout, job.named(teacher).first
        self._trainer, self._hidden_like = job.role, hidden_like
        self._padded, self._vocab_size = padded_vocab_size, vocab_size
        self._inbox: Mailbox | None = Mailbox(inbox(teacher), lambda: another_connection(timeout_s))
        self._outbox = Mailbox(outbox(teacher), lambda: another_connection(timeout_s)) if is_rank_zero() else None
        self._measured: dict[str, float] = {}
        self._bridge = Bridge(job, teacher, timeout_s=timeout_s)
        self._answer("ready")

    @property
    def hidden_like(self) -> Tensor:
        """See Scorer."""
        return self._hidden_like

    def _post(self, message: Message) -> None:
        if self._inbox is None:
            raise ScorerError("the teacher was stopped")
        self._inbox.post(message)

    def _answer(self, kind: str) -> Message:
        """Wait for the teacher's answer; return it on every rank.  Collective.

        There is no deadline: torchrun ends the job when a rank of the teacher's fails, also of a timeout.

        Raises:
            ScorerError: on every rank: the teacher could not score.
        """

        def take() -> Message | None:
            assert self._outbox is not None
            return self._outbox.take(_ROUND_S)

        while (message := on_rank_zero(take, ScorerError)) is None:
            pass
        if message.kind == "failed":
            raise ScorerError(message.values["reason"])
        if message.kind != kind:
            raise ScorerError(f"the teacher answered {message.kind!r}; expected {kind!r}")
        return message

    def submit(self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> None:
        """See Scorer."""
        self._post(score_message(step, rollouts, want))

    def scores(
        self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """See Scorer."""
        started = time.perf_counter()
        targets = {index: self._trainer.first + destination.rank(index) for index in rollouts}
        on_rank_zero(lambda: self._post(deliver_message(step, targets)), ScorerError)
        answer = self._answer("scored")
        sources = dict(answer.values["sources"])
        receive: dict[int, list[int]] = defaultdict(list)
        for index, target in targets.items():
            if target == self._bridge.rank:
                receive[sources[index]].append(index)
        specs = payloads(rollouts, want, self._hidden_like, dict(answer.values["topk_rows"]))
        wanted = {peer: [s for i in indices for s in specs[i].values()] for peer, indices in receive.items()}
        arrived = exchange({}, wanted, self._bridge)
        mine: dict[int, TeacherScores] = {}
        for peer, indices in receive.items():
            mine |= unflatten(arrived[peer], indices, specs)
        self._measured = {
            "wait_s": time.perf_counter() - started,
            "payload_bytes_per_token": bytes_per_token(rollouts, specs),
            "busy_frac": answer.values["busy_s"] / max(answer.values["total_s"], 1e-9),
        }
        return share(mine, rollouts, specs, destination)

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """See Scorer."""
        values = {"sequences": [list(sequence) for sequence in sequences], "vocab_size": vocab_size}
        on_rank_zero(lambda: self._post(Message(kind="logprobs", values=values)), ScorerError)
        try:
            found: list[list[float]] = self._answer("logprobs").values["found"]
        except ScorerError as error:
            raise ValueError(str(error)) from error
        return found

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """See Scorer."""
        first = self._trainer.first
        message = table_message(student.layout, first, padded_vocab_size)
        on_rank_zero(lambda: self._post(message), ScorerError)
        return reshard_output_table(
            None, Grid(layout=self._layout, first=self._first), Grid(layout=student.layout, first=first),
            width=self._hidden_like.shape[1], dtype=self._hidden_like.dtype,
            padded=(self._padded, padded_vocab_size), vocab_size=self._vocab_size, link=self._bridge,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """``wait_s``: seconds that the trainer waited for the last batch's scores; ``busy_frac``: share of the time
        since the batch before that the teacher scored; ``payload_bytes_per_token``."""
        measured, self._measured = self._measured, {}
        return measured

    def close(self) -> None:
        """Tell the teacher's ranks to stop, and wait until they do; not collective."""
        box, self._inbox = self._inbox, None
        if box is not None and self._outbox is not None:
            box.post(Message(kind="stop"))
            deadline = time.monotonic() + _STOP_S
            while time.monotonic() < deadline:
                message = self._outbox.take(1.0)
                if message is not None and message.kind == "stopped":
                    return
