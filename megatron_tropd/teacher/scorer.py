"""The interface between the training loop and whatever scores tokens: a model on the trainer's ranks, on ranks of its
own, on servers, or numbers in a file.

A scorer is given rollouts as they finish (``submit``), on the rank where they arrive, and asked for the scores of a
whole batch (``scores``) when all are written.  A scorer elsewhere works in between, while others are still written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


class ScorerError(RuntimeError):
    """A batch cannot be scored.  Its rollouts are whole, and can be scored later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where the scores are needed: the student's layout, and the data-parallel rank that trains on each rollout."""

    groups: ModelGroups
    owners: Mapping[int, int]

    def rank(self, index: int) -> int:
        """First rank (tensor and context) of the last stage of the replica that owns rollout ``index``."""
        layout = self.groups.layout
        return layout.rank(tp=0, pp=layout.pp - 1, dp=self.owners[index])


class Scorer(Protocol):
    """A frozen model that scores response tokens, wherever it is."""

    @property
    def hidden_like(self) -> Tensor | None:
        """Empty tensor [0, H] with the width and dtype of the hidden states that it can send; None if it sends none."""

    def submit(self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> None:
        """Take finished rollouts of batch ``step``, by index in the batch; returns at once.

        Called on the rank where they arrived, once for every rollout of a batch, from any thread; not collective.
        """

    def scores(
        self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """Wait for the scores of batch ``step``; return those of the rollouts that this rank trains on, by index.

        Called once for a batch, with all of it that was submitted, in the same order on all ranks, and with the same
        ``want``.  Collective over the trainer's ranks.

        Raises:
            ScorerError, ValueError: on every rank alike.
        """

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """Return the log-probability [nats] of every token but the first of each sequence, over ``vocab_size`` ids, on
        every rank.  Collective over the trainer's ranks.

        Raises:
            ScorerError, ValueError: on every rank alike; ValueError where logits are NaN or +inf.
        """

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """Rows of the model's output table for this rank's part of the student's vocabulary, which has
        ``padded_vocab_size`` rows in all: [v, H], None before the student's last stage.  Collective.

        Raises:
            ScorerError: this scorer has no table to give.
        """

    def metrics(self) -> dict[str, float]:
        """Return what was measured since the last call, by names of docs/metrics.md without their group; the same
        names on every rank, values that count on rank 0."""

    def close(self) -> None:
        """End what was started for it.  May be called twice."""
