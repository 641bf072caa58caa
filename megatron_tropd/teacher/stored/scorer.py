"""A teacher whose scores were made before the run: each rank reads what it trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_tropd.parallel.fail_together import on_all_ranks
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.teacher.scorer import Destination, ScorerError
from megatron_tropd.teacher.stored.files import ScoreFiles, key_of
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


class StoredScorer:
    """Implements Scorer with the files of a directory, for responses that were scored before."""

    def __init__(self, files: ScoreFiles) -> None:
        self._files = files

    @property
    def hidden_like(self) -> None:
        """See Scorer: no hidden states are stored."""
        return None

    def submit(self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> None:
        """Nothing: reading takes no time worth hiding."""

    def scores(
        self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """See Scorer.

        Raises:
            ScorerError: on every rank: a response was not scored.
        """
        groups = destination.groups
        mine = [i for i in rollouts if groups.is_last_stage and destination.owners[i] == groups.coords.dp]
        return on_all_ranks(lambda: {index: self._read(rollouts[index], want) for index in mine}, ScorerError)

    def _read(self, rollout: Rollout, want: ScoreRequest) -> TeacherScores:
        key = key_of(rollout.token_ids, rollout.prompt_len)
        found = self._files.scores(key, top_k=want.top_k, entropy=want.entropy)
        if found is None:
            raise ScorerError(
                f"the response to prompt {rollout.prompt_uid} has no scores in --teacher-scores "
                f"{self._files.directory}; run megatron_tropd.score_responses with this data"
            )
        return found

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """See Scorer: there is no model to ask.

        Raises:
            ScorerError: always.
        """
        raise ScorerError("--teacher-placement file has stored scores and no model that could score other text")

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """See Scorer: there is no model to ask.

        Raises:
            ScorerError: always.
        """
        raise ScorerError("--teacher-placement file has stored scores and no output table")

    def metrics(self) -> dict[str, float]:
        """See Scorer: nothing is sent."""
        return {}

    def close(self) -> None:
        """Nothing to end."""
