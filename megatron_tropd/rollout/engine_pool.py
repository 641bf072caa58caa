"""The interface between the training loop and the rollout engines.

Through it the loop gets rollouts and pushes new weights.  Whether the engines run in the trainer's processes or as
servers, and how weights reach them, is up to the implementation.  Every method is collective over the trainer's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import Counts, GenerationRequest, Rollout

Export = Callable[[], Iterable[tuple[str, Tensor]]]
"""Begins a collective export of the student's weights: whole tensors by HF name, on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """Measurements of the engines after a push of weights; the same on every rank."""

    probe_logprobs: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """By engine: log-probability of every token but the first of each probe sequence, by the new weights.  Empty
    for engines that have nothing to prove: they share the trainer's process, and received its very tensors."""


class EnginePool(Protocol):
    """All engines of a run together."""

    @property
    def weight_version(self) -> int | None:
        """Version of the engines' weights; None while they are incomplete."""

    @property
    def counts(self) -> dict[str, int]:
        """Counts of failures that were recovered so far, by the names of ``engine/...`` in docs/metrics.md."""

    @property
    def written(self) -> Counts | None:
        """Finished responses of the generation that goes on, as far as this rank knows of them; None where there is
        none.  May be read by another thread."""

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams, version: int) -> list[Rollout]:
        """Return the rollouts of all requests, in their order, on every rank; all are written with weight ``version``.

        Raises:
            EngineError: on every rank alike.
        """

    def push(self, export: Export, version: int) -> PushReport:
        """Send complete new weights to every engine and verify that they arrived.

        Args:
            export: begins this rank's part of the same collective export; engines that take weights another way do
                not call it.
            version: of the weights.

        Raises:
            EngineError: on every rank alike; nothing is written until a whole push succeeds.
        """

    def close(self) -> None:
        """Free the engines' memory.  May be called twice."""
