"""One embedded engine per rank: requests are divided among the ranks, and rollouts gathered in request order."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from megatron_tropd.parallel.fail_together import from_all_ranks
from megatron_tropd.rollout.engine import EngineError, RolloutEngine, SamplingParams
from megatron_tropd.rollout.engine_pool import Export, PushReport
from megatron_tropd.types import Counts, GenerationRequest, Rollout


class EmbeddedPool:
    """Implements EnginePool with one engine in each of the trainer's processes."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

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

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams, version: int) -> list[Rollout]:
        """Rollouts of all requests, on every rank.

        Raises:
            EngineError: on every rank alike, when any engine failed or wrote with other weights than
                ``version``.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

        def write() -> list[Rollout]:
            try:
                return self.engine.generate(requests[rank::world_size], params)
            except Exception as error:
                raise EngineError(f"engine of rank {rank}: {error}") from error

        written = from_all_ranks(write, EngineError)
        stale = {rollout.weight_version for part in written for rollout in part} - {(version, version)}
        if stale:
            raise EngineError(f"rollouts were written by weight versions {sorted(stale)}, the trainer is at {version}")
        return [written[i % world_size][i // world_size] for i in range(len(requests))]

    def push(self, export: Export, version: int) -> PushReport:
        """Give every engine the tensors of the collective export that ``export`` begins."""
        self.engine.begin_update(version)
        self.engine.update(export())
        self.engine.end_update(version)
        return PushReport()

    def close(self) -> None:
        """Free this rank's engine."""
        self.engine.close()
