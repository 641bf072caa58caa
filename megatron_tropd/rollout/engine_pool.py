"""The interface between the training loop and the rollout engines.

Through it the loop hands out requests, gets rollouts as they finish, and pushes new weights.  Whether the engines run
in the trainer's processes or as servers, and how weights reach them, is up to the implementation.  Every method is
collective over the trainer's ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from megatron_tropd.rollout.engine import Arrived, SamplingParams, ignore
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
    """All engines of a run together.  One batch of requests is written at a time."""

    @property
    def weight_version(self) -> int | None:
        """Version of the engines' weights; None while they are incomplete."""

    @property
    def counts(self) -> dict[str, int]:
        """Counts of failures that were recovered so far, by the names of ``engine/...`` in docs/metrics.md."""

    @property
    def written(self) -> Counts | None:
        """Finished responses of the batch that is in writing, as far as this rank knows of them; None where there is
        none.  May be read by another thread."""

    def idle_share(self) -> float:
        """Share of the time since the last call in which nothing was in writing, as rank 0 sees it; not collective."""

    def submit(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, version: int, arrived: Arrived = ignore
    ) -> None:
        """Begin to write all requests with weight ``version``; engines that can go on while the trainer trains.

        Raises:
            EngineError: on every rank alike: other weights are loaded, a request is malformed, an engine failed.
        """

    def finished(self, version: int) -> list[Rollout]:
        """Wait for what was submitted; return all rollouts in the order of the requests, on every rank.

        Each rollout records the weight version that wrote it.  ``version`` is the one that the trainer holds now; it
        is given to engines that lost theirs, for the requests that are left.

        Raises:
            EngineError: on every rank alike.
        """

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams, version: int) -> list[Rollout]:
        """:meth:`submit` and :meth:`finished` in one: all rollouts are written with weight ``version``."""
        self.submit(requests, params, version)
        return self.finished(version)

    def sleep(self) -> None:
        """Nothing is written until the next push: engines that can, and were told to, free their memory.

        They may hold no weights afterwards (:attr:`weight_version` tells).
        """

    def wake(self) -> None:
        """Take the memory again, before a push."""

    def push(self, export: Export, version: int) -> PushReport:
        """Send complete new weights to every engine and verify that they arrived.  Nothing may be in writing.

        Args:
            export: begins this rank's part of the same collective export; engines that take weights another way do
                not call it.
            version: of the weights.

        Raises:
            EngineError: on every rank alike; nothing is written until a whole push succeeds.
        """

    def close(self) -> None:
        """Free the engines' memory.  May be called twice."""
