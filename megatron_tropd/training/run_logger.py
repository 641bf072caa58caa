"""The log of a run.  Only rank 0 writes; the logger of any other rank does nothing."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_tropd.grading.grader import Grader, Question
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.fail_together import on_rank_zero
from megatron_tropd.reporting.progress.progress import NullProgress
from megatron_tropd.reporting.rollout_samples import TokenText, sample_of
from megatron_tropd.reporting.run_directory import RunDirectory
from megatron_tropd.reporting.sinks import Sinks
from megatron_tropd.reports import EvalReport, StepReport, TokenNumbers
from megatron_tropd.types import Prompt, Rollout

ROLLOUTS_KEPT = 8
ROLLOUTS_READ = 64
"""Rollouts per step that are decoded and judged; few, because the other ranks wait for rank 0 meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutReader:
    """Decodes rollouts and, where the answer is known, tells whether they are right."""

    text: TokenText
    prompts: Mapping[int, Prompt]
    """By uid; may be empty."""
    grader: Grader

    def name(self, rollout: Rollout) -> str:
        """Return the text by which the data names the prompt; "" if it has none."""
        prompt = self.prompts.get(rollout.prompt_uid)
        return "" if prompt is None else prompt.name

    def correct(self, rollouts: Sequence[Rollout]) -> list[bool | None]:
        """Return for each rollout whether the answer that the student wrote is right.

        None where no answer is known, where the student wrote nothing, and where the answer of the response begins in
        the teacher's prefix: it would say something about the teacher.
        """
        questions = [self._question(rollout) for rollout in rollouts]
        verdicts = iter(self.grader.all_right([question for question in questions if question]))
        return [next(verdicts) if question else None for question in questions]

    def _question(self, rollout: Rollout) -> Question | None:
        prompt = self.prompts.get(rollout.prompt_uid)
        reference = None if prompt is None else prompt.answer
        if prompt is None or reference is None or not rollout.logprobs:
            return None
        response = self.text.decode(rollout.token_ids[rollout.prompt_len :])
        if rollout.guidance_len:
            given = self.text.decode(rollout.token_ids[rollout.prompt_len : rollout.prompt_len + rollout.guidance_len])
            answer = self.grader.of_row(prompt.grader).answer(response)
            # A prefix may end inside a character, which is then shown as U+FFFD.
            if answer is not None and answer.start < len(given.rstrip("\ufffd")):
                return None
        return Question(response=response, finished=rollout.finish == "stop", reference=reference, grader=prompt.grader)


class RunLogger:
    """Writes steps, evaluations and sampled rollouts to the run directory, the sinks and the display."""

    def __init__(
        self,
        directory: RunDirectory | None,
        sinks: Sinks,
        progress: NullProgress,
        reader: RolloutReader,
        *,
        rollout_interval: int,
        last_step: int,
    ) -> None:
        """``directory`` is None on every rank but 0."""
        self._directory, self._sinks, self._progress, self._reader = directory, sinks, progress, reader
        self._rollout_interval, self._last_step = rollout_interval, last_step

    def rollouts_shown(self, step: int) -> int:
        """Return how many rollouts of ``step`` are written down to be read: the first ones.  Equal on all ranks."""
        interval = self._rollout_interval
        due = interval and (step % interval == 0 or step in (1, self._last_step))
        return ROLLOUTS_KEPT if due else 0

    def step(self, report: StepReport, rollouts: Sequence[Rollout], tokens: Mapping[int, TokenNumbers]) -> None:
        """Log one finished step.

        Args:
            report: of the step.
            rollouts: of the step, in the order of the batch.
            tokens: by index of a rollout that is shown, what the loss read of its tokens; read on rank 0.
        """
        if self._directory is None:
            return
        verdicts = self._reader.correct(rollouts[:ROLLOUTS_READ])
        report = replace(report, metrics={**report.metrics, **_rank_zero_metrics(report, verdicts)})
        self._sinks.record(self._directory.step(report))
        self._progress.step(report)
        if shown := self.rollouts_shown(report.step):
            samples = [
                sample_of(
                    rollout,
                    self._reader.text,
                    numbers=tokens.get(index),
                    correct=verdicts[index],
                    name=self._reader.name(rollout),
                )
                for index, rollout in enumerate(rollouts[:shown])
            ]
            self._directory.rollouts(report.step, samples)

    def has_evaluation(self, step: int) -> bool:
        """Return on every rank whether the log holds an evaluation after ``step``.  Collective."""
        return on_rank_zero(lambda: self._directory is not None and self._directory.has_evaluation(step))

    def evaluation(self, report: EvalReport) -> None:
        """Log one finished evaluation."""
        if self._directory is None:
            return
        self._sinks.record(self._directory.evaluation(report))
        self._progress.evaluation(report)


def _rank_zero_metrics(report: StepReport, verdicts: Sequence[bool | None]) -> dict[str, float]:
    """Return the metrics that only rank 0 measures: its peak memory, throughput, accuracy of the rollouts."""
    metrics = {"memory/peak_bytes": float(peak_bytes())}
    if seconds := sum(report.seconds.values()):
        metrics["throughput/tokens_per_second"] = sum(report.tokens.values()) / seconds
    if known := [verdict for verdict in verdicts if verdict is not None]:
        metrics["rollout/accuracy"] = sum(known) / len(known)
    return metrics


def peak_bytes() -> int:
    """Return the peak memory of this process in bytes: allocated on its GPU, or resident where it has none."""
    if platform.is_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
