"""Exact match on held-out prompts: before, during and after a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_tropd.config import TrainConfig
from megatron_tropd.evaluation import DECODINGS, Generate, evaluate
from megatron_tropd.reporting.progress import NullProgress
from megatron_tropd.training.journal import Journal
from megatron_tropd.types import Prompt


class Evaluations:
    """Which prompts are answered when, with which decodings.  Collective over the world."""

    def __init__(
        self, config: TrainConfig, prompts: Sequence[Prompt], tokenizer: Any, journal: Journal, progress: NullProgress
    ) -> None:
        self._config, self._prompts, self._tokenizer = config, prompts, tokenizer
        self._journal, self._progress = journal, progress

    def whole(self, generate: Generate, *, step: int) -> None:
        """All prompts, all decodings."""
        self._run(generate, self._prompts, step)

    def part_if_due(self, generate: Generate, *, step: int) -> None:
        """The first --eval-prompts prompts, every --eval-interval steps; not at the last step, where
        :meth:`whole` follows."""
        settings = self._config.evaluation
        if settings.eval_interval and step % settings.eval_interval == 0 and step < self._config.training.train_iters:
            prompts = self._prompts[: settings.eval_prompts or None]
            self._run(generate, prompts, step)

    def _run(self, generate: Generate, prompts: Sequence[Prompt], step: int) -> None:
        if not prompts:
            return
        with self._progress.phase("eval"):
            reports = evaluate(
                generate,
                prompts,
                self._tokenizer,
                list(DECODINGS.values()),
                answer_pattern=self._config.evaluation.answer_pattern,
                max_response_length=self._config.data.max_response_length,
                seed=self._config.training.seed,
                step=step,
            )
        for report in reports:
            self._journal.evaluation(report)
