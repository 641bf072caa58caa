"""Compare the configurations of all ranks of a job, in all its worlds."""

from __future__ import annotations

import json
from typing import Any

from megatron_tropd.cli import ConfigError, to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel.fail_together import from_all_ranks
from megatron_tropd.parallel.roles import Job, another_connection
from megatron_tropd.reporting.redaction import redact_mapping
from megatron_tropd.teacher_files import settings_of_teachers

_KEY = "configuration"


def check_same_configuration(config: TrainConfig, job: Job) -> None:
    """Compare the configurations of this world's ranks with each other, and with that of the job's first rank.
    Collective over the world.

    Nodes read their own flags and files, and each finds a branch of the Hub at the commit that is its newest then.

    Raises:
        ConfigError: on every rank of the world: they differ; the message names each flag, with secrets hidden.
    """
    mine = json.dumps({**to_flags(config), **settings_of_teachers(config.teachers)})
    everyone = from_all_ranks(lambda: (job.rank, mine))
    if len(job.roles) > 1:
        everyone.insert(0, (0, _of_first_rank(mine, job, config.parallel.distributed_timeout_s)))
    first = json.loads(everyone[0][1])
    errors: dict[str, str] = {}
    for rank, text in everyone[1:]:
        flags = json.loads(text)
        for name, values in _differences(first, flags).items():
            errors.setdefault(
                name,
                f"--{name} is {values[0]!r} on rank 0 and {values[1]!r} on rank {rank}; give every node the same flags "
                "and files, and a model of the Hub with its commit (owner/name@commit)",
            )
    if errors:
        raise ConfigError(list(errors.values()))


def _of_first_rank(mine: str, job: Job, timeout_s: float) -> str:
    """Return what the job's first rank, which is in the trainer's world, was given."""
    store = another_connection(timeout_s)
    if job.rank == 0:
        store.set(_KEY, mine)
    return store.get(_KEY).decode()


def _differences(first: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    shown = redact_mapping(first), redact_mapping(other)
    return {name: (shown[0].get(name), shown[1].get(name)) for name in names}
