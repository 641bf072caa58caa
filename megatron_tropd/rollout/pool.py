"""Every rank's engine as one: requests are dealt out, rollouts are gathered in request order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from megatron_tropd.rollout.engine import EngineError, RolloutEngine, SamplingParams
from megatron_tropd.types import GenerationRequest, Rollout


class EnginePool:
    """One engine on each of ``world_size`` ranks; every method is collective over them."""

    def __init__(
        self, engine: RolloutEngine, *, rank: int, world_size: int, gather: Callable[[Any], list[Any]]
    ) -> None:
        self.engine = engine
        self._rank, self._world_size, self._gather = rank, world_size, gather

    @property
    def weight_version(self) -> int | None:
        """What this rank's engine writes with; None while it has no whole set."""
        return self.engine.weight_version

    @property
    def counts(self) -> dict[str, int]:
        """What went wrong so far and was made good; nothing can with these engines."""
        return {}

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams, version: int) -> list[Rollout]:
        """Rollouts of all requests, on every rank.

        Raises:
            EngineError: on every rank alike, when any engine failed or wrote with other weights than
                ``version``.
        """
        mine: list[Rollout] | str
        try:
            mine = self.engine.generate(requests[self._rank :: self._world_size], params)
        except EngineError as error:
            mine = f"engine of rank {self._rank}: {error}"
        answers = self._gather(mine)
        if failures := [answer for answer in answers if isinstance(answer, str)]:
            raise EngineError("; ".join(failures))
        stale = {r.weight_version for answer in answers for r in answer} - {(version, version)}
        if stale:
            raise EngineError(f"rollouts were written by weight versions {sorted(stale)}, the trainer is at {version}")
        return [answers[i % self._world_size][i // self._world_size] for i in range(len(requests))]

    def push(self, export: Callable[[], Iterable[tuple[str, Tensor]]], version: int) -> None:
        """Give every engine whole new weights, by HF name, of the collective export that ``export`` begins."""
        self.engine.begin_update(version)
        self.engine.update(export())
        self.engine.end_update(version)

    def close(self) -> None:
        """Free this rank's engine."""
        self.engine.close()
