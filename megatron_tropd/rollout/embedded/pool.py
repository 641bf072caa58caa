"""One embedded engine per rank: requests are divided among the ranks, and rollouts gathered in request order."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.fail_together import from_all_ranks
from megatron_tropd.rollout.engine import Arrived, RolloutEngine, SamplingParams, ignore
from megatron_tropd.rollout.engine_pool import EnginePool, Export, PushReport
from megatron_tropd.rollout.idle_clock import IdleClock
from megatron_tropd.types import Counts, GenerationRequest, Rollout


class EmbeddedPool(EnginePool):
    """Implements EnginePool with one engine in each of the trainer's processes.

    They share the trainer's device, so a batch is written when it is submitted, not while the trainer trains.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine, self._clock = engine, IdleClock()
        self._written: list[Rollout] | None = None

    @property
    def weight_version(self) -> int | None:
        """Version of the weights of this rank's engine; None while they are incomplete."""
        return self.engine.weight_version

    @property
    def counts(self) -> dict[str, int]:
        """Empty: these engines have no failure from which they can recover."""
        return {}

    @property
    def written(self) -> Counts | None:
        """Finished responses of this rank's share of the requests; None before the first."""
        return self.engine.written

    def idle_share(self) -> float:
        """See EnginePool."""
        return self._clock.idle_share()

    def submit(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, version: int, arrived: Arrived = ignore
    ) -> None:
        """Write all requests; every rank hands on the rollouts of its share.

        Raises:
            EngineError: on every rank alike, when any engine failed or wrote with other weights than ``version``.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = range(rank, len(requests), world_size)

        def write() -> list[Rollout]:
            try:
                return self.engine.generate(
                    [requests[i] for i in mine], params, lambda found: arrived({mine[i]: r for i, r in found.items()})
                )
            except Exception as error:
                raise EngineError(f"engine of rank {rank}: {error}") from error

        self._clock.start()
        try:
            parts = from_all_ranks(write, EngineError)
        finally:
            self._clock.stop()
        stale = {rollout.weight_version for part in parts for rollout in part} - {(version, version)}
        if stale:
            raise EngineError(f"rollouts were written by weight versions {sorted(stale)}, the trainer is at {version}")
        self._written = [parts[i % world_size][i // world_size] for i in range(len(requests))]

    def finished(self, version: int) -> list[Rollout]:
        """Rollouts of all requests, on every rank."""
        written, self._written = self._written, None
        if written is None:
            raise EngineError("no requests were submitted")
        return written

    def sleep(self) -> None:
        """Nothing: the engines keep their memory."""

    def wake(self) -> None:
        """Nothing."""

    def push(self, export: Export, version: int) -> PushReport:
        """Give every engine the tensors of the collective export that ``export`` begins."""
        self.engine.begin_update(version)
        self.engine.update(export())
        self.engine.end_update(version)
        return PushReport()

    def close(self) -> None:
        """Free this rank's engine."""
        self.engine.close()
