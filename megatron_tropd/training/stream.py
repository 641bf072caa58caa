"""Connects prompts, engines and scorers: the way of a rollout until all of its batch are written.

    source -> guidance -> engines -> (as each finishes) scorers
                             |
                             v
                      the whole batch, for the trainer

A scorer elsewhere works on finished rollouts while others are still written.  With --rollout-lag 1 the engines write
the next batch, and such scorers score it, while the trainer trains on this one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_tropd import rng
from megatron_tropd.config import TrainConfig
from megatron_tropd.data import guidance
from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.parallel.fail_together import is_rank_zero
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.rollout.engine_pool import EnginePool
from megatron_tropd.teacher.kept_scores import ScoreStore
from megatron_tropd.teacher.scorer import Scorer
from megatron_tropd.training.spool import Spool
from megatron_tropd.types import GenerationRequest, Prompt, Rollout, ScoreRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """A scorer of the run's rollouts, and what it is asked for."""

    scorer: Scorer
    want: Callable[[int], ScoreRequest]
    """By step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """A whole batch that was written and not yet trained on."""

    step: int
    rollouts: Sequence[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class _InWriting:
    """A batch that the engines write."""

    step: int
    kept: Mapping[int, Rollout]
    """What an earlier launch wrote of it, by request."""
    missing: Sequence[int]
    """The requests that the engines were given."""


class Stream:
    """The batches of a run, in order.  Every method is collective over the trainer's ranks.

    Args:
        config: of the run.
        source: of the prompts; its cursor is behind the batch that was begun last.
        engines: None where responses are those of the data.
        scorers: all that score the rollouts of a batch.
        report_top_k: number of the student's own most probable ids that rollouts bring.
        spool: keeps finished rollouts of an unfinished batch; None: they are lost with the process.
        kept_scores: has the scores that the scorers keep of an unfinished batch; None: they keep none.
    """

    def __init__(
        self, config: TrainConfig, source: PromptSource, engines: EnginePool | None, scorers: Sequence[Scoring], *,
        report_top_k: int = 0, spool: Spool | None = None, kept_scores: ScoreStore | None = None,
    ) -> None:  # fmt: skip
        self._report_top_k, self._spool, self._kept_scores = report_top_k, spool, kept_scores
        self._config, self._source, self._engines, self._scorers = config, source, engines, scorers
        self._in_writing: _InWriting | None = None
        self._pending: Pending | None = None

    @property
    def pending(self) -> Pending | None:
        """The batch that waits for its training; a checkpoint holds it, because its prompts are taken."""
        return self._pending

    def resume(self, pending: Pending) -> None:
        """Go on with a batch that an earlier launch wrote; what that launch did not score is scored."""
        self._pending = pending
        self._hand_on(pending.step, dict(enumerate(pending.rollouts)) if is_rank_zero() else {})

    def begin(self, step: int, version: int) -> None:
        """Take the prompts of ``step`` and have its rollouts written with weight ``version``, unless that was begun.

        Raises:
            EngineError: on every rank alike.
        """
        if (self._in_writing and self._in_writing.step == step) or (self._pending and self._pending.step == step):
            return
        prompts = self._source.take(self._config.rollout.rollout_batch_size)
        if self._engines is None:
            rollouts = guidance.whole_responses(prompts, version, scored=bool(self._scorers))
            self.resume(Pending(step=step, rollouts=rollouts))
            return
        sampling = SamplingParams(
            seed=self._config.training.seed, stream=rng.Stream.SAMPLING, step=step, report_top_k=self._report_top_k
        )
        requests = self._requests(prompts, step)
        kept = self._spool.begin(requests, sampling, version) if self._spool else {}
        missing = [index for index in range(len(requests)) if index not in kept]
        self._hand_on(step, kept if is_rank_zero() else {})
        if missing:
            self._engines.submit(
                [requests[index] for index in missing], sampling, version,
                lambda found: self._arrived(step, {missing[number]: rollout for number, rollout in found.items()}),
            )  # fmt: skip
        self._in_writing = _InWriting(step=step, kept=kept, missing=missing)

    def _requests(self, prompts: Sequence[Prompt], step: int) -> list[GenerationRequest]:
        config = self._config
        return guidance.attach(
            prompts,
            step,
            config.guidance,
            seed=config.training.seed,
            n_samples_per_prompt=config.rollout.n_samples_per_prompt,
            max_response_length=config.data.max_response_length,
        )

    def _arrived(self, step: int, found: Mapping[int, Rollout]) -> None:
        """Keep and hand on rollouts that an engine has finished."""
        if self._spool is not None:
            self._spool.add(found)
        self._hand_on(step, found)

    def _hand_on(self, step: int, found: Mapping[int, Rollout]) -> None:
        """Give finished rollouts to the scorers, on the rank and in the thread where they arrived."""
        if found:
            for scoring in self._scorers:
                scoring.scorer.submit(step, found, scoring.want(step))

    def settle(self, version: int) -> None:
        """Wait until nothing is in writing; the batch that was is kept.  The engines can then be given new weights.

        Raises:
            EngineError: on every rank alike.
        """
        if self._in_writing is None:
            return
        assert self._engines is not None, "only engines write"
        batch, self._in_writing = self._in_writing, None
        written = self._engines.finished(version) if batch.missing else []
        rollouts = {**batch.kept, **dict(zip(batch.missing, written, strict=True))}
        self._pending = Pending(step=batch.step, rollouts=[rollouts[index] for index in range(len(rollouts))])

    def take(self, step: int, version: int) -> Sequence[Rollout]:
        """Return the rollouts of ``step`` on every rank, begun now unless they were begun before.

        The batch stays :attr:`pending` until :meth:`trained`.

        Raises:
            EngineError: on every rank alike.
        """
        self.begin(step, version)
        self.settle(version)
        assert self._pending is not None and self._pending.step == step, "batches are taken in order"
        return self._pending.rollouts

    def take_prompts_back(self) -> None:
        """Forget the batch in writing, if there is one: its prompts are taken again."""
        if self._in_writing is not None:
            self._in_writing = None
            self._source.consumed -= self._config.rollout.rollout_batch_size

    def trained(self) -> None:
        """The batch that was taken is trained on."""
        assert self._pending is not None, "taken before"
        if self._kept_scores is not None:
            self._kept_scores.clear(self._pending.step)
        self._pending = None
        if self._spool is not None:
            self._spool.clear()

    def distrust(self, *, rollouts: bool) -> None:
        """Delete what is kept of scores, and of ``rollouts``: the next launch shall not fail of the same numbers."""
        if self._kept_scores is not None:
            self._kept_scores.clear()
        if self._spool is not None and rollouts:
            self._spool.clear()
