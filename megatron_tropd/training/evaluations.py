"""Accuracy on held-out prompts: before, during and after a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_tropd.config import TrainConfig
from megatron_tropd.evaluation import DECODINGS, Generate, evaluate
from megatron_tropd.grading.grader import Grader
from megatron_tropd.reporting.progress.progress import NullProgress
from megatron_tropd.training.run_logger import RunLogger
from megatron_tropd.types import Counts, Prompt


class Evaluations:
    """Evaluates the student on the held-out prompts, with every decoding."""

    def __init__(
        self, config: TrainConfig, prompts: Sequence[Prompt], tokenizer: Any, grader: Grader, logger: RunLogger,
        progress: NullProgress,
    ) -> None:  # fmt: skip
        self._config, self._prompts, self._tokenizer, self._grader = config, prompts, tokenizer, grader
        self._run_logger, self._progress = logger, progress

    def due(self, step: int) -> bool:
        """Return whether to evaluate after ``step``: every --eval-interval steps, except the last step, which is
        followed by an evaluation of all prompts."""
        interval = self._config.evaluation.eval_interval
        return bool(self._prompts and interval and step % interval == 0 and step < self._config.training.train_iters)

    def run(self, generate: Generate, *, step: int, whole: bool, counts: Callable[[], Counts | None]) -> None:
        """Answer all prompts, or only the first --eval-prompts, and log a report per decoding.  Collective.

        ``counts`` says how far ``generate`` is with the decoding that goes on.
        """
        prompts = self._prompts if whole else self._prompts[: self._config.evaluation.eval_prompts or None]
        if not prompts:
            return
        with self._progress.phase("eval", counts):
            reports = evaluate(
                generate,
                prompts,
                self._tokenizer,
                list(DECODINGS.values()),
                grader=self._grader,
                max_response_length=self._config.data.max_response_length,
                seed=self._config.training.seed,
                step=step,
                num_samples=self._config.evaluation.eval_num_samples,
            )
        for report in reports:
            self._run_logger.evaluation(report)
