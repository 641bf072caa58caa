"""What rank 0 writes down; other ranks hold a journal that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_tropd.reporting.progress import NullProgress
from megatron_tropd.reporting.rollout_samples import sample_of
from megatron_tropd.reporting.run_directory import RunDirectory
from megatron_tropd.reporting.sinks import Sinks
from megatron_tropd.types import EvalReport, Rollout, StepReport

ROLLOUTS_KEPT = 8


class Journal:
    """Steps, evaluations and sampled rollouts, to the run directory, the sinks and the display."""

    def __init__(
        self,
        directory: RunDirectory | None,
        sinks: Sinks,
        progress: NullProgress,
        *,
        decode: Callable[[Sequence[int]], str],
        rollout_interval: int,
        last_step: int,
    ) -> None:
        """``directory`` is None on every rank but 0."""
        self._directory, self._sinks, self._progress = directory, sinks, progress
        self._decode, self._rollout_interval, self._last_step = decode, rollout_interval, last_step

    def step(self, report: StepReport, rollouts: Sequence[Rollout]) -> None:
        """One finished step."""
        if self._directory is None:
            return
        self._sinks.record(self._directory.step(report))
        self._progress.step(report)
        interval = self._rollout_interval
        if interval and (report.step % interval == 0 or report.step in (1, self._last_step)):
            samples = [sample_of(rollout, self._decode) for rollout in rollouts[:ROLLOUTS_KEPT]]
            self._directory.rollouts(report.step, samples)

    def evaluation(self, report: EvalReport) -> None:
        """One finished evaluation."""
        if self._directory is None:
            return
        self._sinks.record(self._directory.evaluation(report))
        self._progress.evaluation(report)
