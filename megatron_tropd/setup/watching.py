"""The watch that every rank keeps on the others while steps are made."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel.hang_watch import Doing, HangError, HangWatch
from megatron_tropd.parallel.job_end import EXIT_FAILED
from megatron_tropd.parallel.rank_monitor import RankMonitor
from megatron_tropd.parallel.roles import Job, another_connection
from megatron_tropd.reporting.progress.heartbeat import Activity

_STORE_S = 60.0
"""A thread that waits longer for the job's store gives up: what holds the store is gone."""


@contextmanager
def watched(
    config: TrainConfig, job: Job, activity: Callable[[], Activity], report: Callable[[BaseException], object]
) -> Iterator[None]:
    """Keep a watch on all ranks of the job until this context is left; a hang is given to ``report``, and then this
    process ends, because its main thread may never come back."""

    monitor = RankMonitor()

    def doing() -> Doing:
        now = activity()
        counts = None
        if now.counts:
            with suppress(Exception):  # of the main thread's data, which changes meanwhile; a beat matters more
                counts = now.counts()
        monitor.tell((now.step, now.phase, counts))
        return Doing(step=now.step, phase=now.phase, seconds=time.monotonic() - now.since, counts=counts)

    def end(error: HangError) -> None:
        report(error)
        os._exit(EXIT_FAILED)

    size = sum(role.size for role in job.roles)
    watch = HangWatch(
        job.rank, size, _judges(size), lambda: another_connection(_STORE_S), doing,
        silence_s=config.parallel.rank_heartbeat_timeout, stuck_s=60 * config.parallel.hang_timeout_minutes,
        folder=Path(config.logging.run_dir), end=end,
    )  # fmt: skip
    if "MASTER_ADDR" in os.environ:  # otherwise this is the only rank, without a store
        watch.start()
    try:
        yield
    finally:
        watch.stop()
        monitor.close()


def serving() -> Callable[[], Activity]:
    """Return what a rank does that answers others as long as the job lasts."""
    activity = Activity(step=0, phase="serve", since=time.monotonic())
    return lambda: activity


def _judges(world_size: int) -> list[int]:
    """Rank 0, and one for the case that rank 0 is silent: the first rank of the second machine, or rank 1."""
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    second = per_node if per_node < world_size else 1
    return [rank for rank in (0, second) if rank < world_size]
