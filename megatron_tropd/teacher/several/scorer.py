"""Several teachers as one: every rollout goes to those that score its prompt's domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.teacher.scorer import Destination, Scorer, ScorerError
from megatron_tropd.teacher.several.mixture import mix
from megatron_tropd.teacher.several.shares import Shares
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores


@dataclass(slots=True, kw_only=True)
class _Sums:
    """What one teacher gave to the rollouts that a rank trains on."""

    rollouts: int = 0
    logprob: float = 0.0
    tokens: int = 0
    reward: float = 0.0
    """Of the tokens that the student wrote: log q - log p, p at the engine."""
    written: int = 0

    def add(self, rollout: Rollout, scores: TeacherScores) -> None:
        """Add the scores of one rollout; tokens with q = 0 are left out, as in the metrics of all teachers."""
        logprobs = scores.logprob.double()
        finite = logprobs.isfinite()
        self.rollouts += 1
        self.logprob += float(logprobs[finite].sum())
        self.tokens += int(finite.sum())
        if any(rollout.logprobs):  # those of the data's responses are 0
            gaps = logprobs[rollout.guidance_len :] - logprobs.new_tensor(rollout.logprobs)
            written = finite[rollout.guidance_len :]
            self.reward += float(gaps[written].sum())
            self.written += int(written.sum())


class SeveralTeachers:
    """Implements Scorer with scorers by the name of their teacher.

    Args:
        parts: the teachers; they are asked for their scores in this order, so one on the trainer's own ranks, which
            works only then, is best first.
        shares: which of them scores what.
        domain_of: domain of a prompt, by its uid.
    """

    def __init__(self, parts: Mapping[str, Scorer], shares: Shares, domain_of: Callable[[int], str]) -> None:
        self._parts, self._shares, self._domain_of = dict(parts), shares, domain_of
        self._measured: dict[str, float] = {}

    @property
    def hidden_like(self) -> None:
        """See Scorer: hidden states of several models have no common output table."""
        return None

    def _weights(self, rollout: Rollout) -> Mapping[str, float]:
        return self._shares.of(self._domain_of(rollout.prompt_uid))

    def _split(self, rollouts: Mapping[int, Rollout]) -> dict[str, dict[int, Rollout]]:
        """Return the rollouts that each teacher scores, without teachers that score none."""
        found: dict[str, dict[int, Rollout]] = {name: {} for name in self._parts}
        for index, rollout in rollouts.items():
            for name in self._weights(rollout):
                found[name][index] = rollout
        return {name: own for name, own in found.items() if own}

    def _want(self, name: str, want: ScoreRequest) -> ScoreRequest:
        """Return what a teacher is asked for.  Which tokens need a top-k depends on the probability that the teacher
        gives them; a mixture's is known only when all have answered, so its teachers send the top-k of all."""
        return replace(want, topk_use=None) if name in self._shares.mixed else want

    def submit(self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> None:
        """See Scorer."""
        for name, own in self._split(rollouts).items():
            self._parts[name].submit(step, own, self._want(name, want))

    def scores(
        self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """See Scorer.

        Raises:
            ScorerError, ValueError: on every rank alike; the message begins with the teacher's name.
        """
        split, found = self._split(rollouts), {}
        for name, own in split.items():
            try:
                found[name] = self._parts[name].scores(step, own, self._want(name, want), destination)
            except ScorerError as error:
                raise ScorerError(f"teacher {name}: {error}") from error
            except ValueError as error:
                raise ValueError(f"teacher {name}: {error}") from error
        self._measure(rollouts, found, destination)
        mine = [index for index in rollouts if any(index in part for part in found.values())]
        return {index: self._joined(rollouts[index], index, found) for index in mine}

    def _joined(self, rollout: Rollout, index: int, found: Mapping[str, Mapping[int, TeacherScores]]) -> TeacherScores:
        weights = self._weights(rollout)
        parts = [found[name][index] for name in weights]
        return parts[0] if len(parts) == 1 else mix(parts, list(weights.values()))

    def _measure(
        self,
        rollouts: Mapping[int, Rollout],
        found: Mapping[str, Mapping[int, TeacherScores]],
        destination: Destination,
    ) -> None:
        """Add up what the teachers gave on all ranks.  Collective over the trainer's ranks."""
        mine = {name: _Sums() for name in found}
        if destination.groups.reports_replica:
            for name, scores in found.items():
                for index, part in scores.items():
                    mine[name].add(rollouts[index], part)
        everyone = gather_objects(mine)
        self._measured = {}
        for name in found:
            sums = [part[name] for part in everyone]
            values = self._parts[name].metrics()
            values["rollouts"] = float(sum(part.rollouts for part in sums))
            if tokens := sum(part.tokens for part in sums):
                values["logprob_mean"] = sum(part.logprob for part in sums) / tokens
            if written := sum(part.written for part in sums):
                values["reward_mean"] = sum(part.reward for part in sums) / written
            self._measured |= {f"{name}/{metric}": value for metric, value in values.items()}
        self._measured["wait_s"] = sum(value for metric, value in self._measured.items() if metric.endswith("/wait_s"))

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """See Scorer: each teacher is asked by itself.

        Raises:
            ScorerError: always.
        """
        raise ScorerError("several teachers give a text several log-probabilities: ask one of them")

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """See Scorer: each teacher has its own.

        Raises:
            ScorerError: always.
        """
        raise ScorerError("several teachers have no common output table")

    def metrics(self) -> dict[str, float]:
        """What each teacher measured, as ``NAME/METRIC``, for those that scored in the last batch; ``rollouts``,
        ``logprob_mean`` and ``reward_mean`` of what each scored; ``wait_s``: of all together."""
        measured, self._measured = self._measured, {}
        return measured

    def close(self) -> None:
        """End what was started for the teachers."""
        for part in self._parts.values():
            part.close()
