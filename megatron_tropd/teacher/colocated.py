"""A frozen model on the student's own ranks: it scores when the trainer asks for a batch's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.teacher.output_table import Grid
from megatron_tropd.teacher.scorer import Destination
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


class ColocatedScorer:
    """Implements Scorer with a model that shares the student's ranks, so it cannot work before it is asked."""

    def __init__(self, model: MegatronTeacher) -> None:
        self._model = model

    @property
    def hidden_like(self) -> Tensor:
        """See Scorer."""
        return self._model.hidden_like

    def submit(self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> None:
        """Nothing: the student's ranks are busy or not all at hand."""

    def scores(
        self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """See Scorer; collective over the world."""
        return self._model.score(rollouts, want, destination)

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """See Scorer."""
        return self._model.logprobs_of(sequences, vocab_size=vocab_size)

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """See Scorer."""
        return self._model.output_rows(Grid(layout=student.layout), padded_vocab_size)

    def metrics(self) -> dict[str, float]:
        """``payload_bytes_per_token``; its time is the phase ``score``."""
        return {"payload_bytes_per_token": self._model.payload_bytes_per_token}

    def close(self) -> None:
        """Nothing to end."""
