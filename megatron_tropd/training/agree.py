"""Steps that all ranks take or none: a failure on one rank becomes the same error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RanksDisagree(RuntimeError):
    """An action failed on some rank; the message names the rank and the reason."""


class FailedElsewhere(RuntimeError):
    """Raised by an action that failed because another rank did; it is not reported beside the real reason."""


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, FailedElsewhere):
        return ""
    text = str(error) or type(error).__name__
    return text if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {text}"


def on_all_ranks(action: Callable[[], T], failure: type[Exception] = RanksDisagree) -> T:
    """Run ``action`` on every rank and return this rank's result.  Collective.

    The action itself may be collective only if it fails on all ranks or on none.

    Raises:
        failure: on every rank, if the action raised on any.
    """
    _, world_size = _world()
    result, caught = None, None
    try:
        result = action()
    except Exception as error:
        caught = error
    reasons: list[str | None] = [None if caught is None else _reason(caught)]
    if world_size > 1:
        mine, reasons = reasons[0], [None] * world_size
        dist.all_gather_object(reasons, mine)
    failed = {r: reason for r, reason in enumerate(reasons) if reason is not None}
    if not failed:
        return result  # type: ignore[return-value]
    failed = {r: reason for r, reason in failed.items() if reason} or failed
    different = set(failed.values())
    if len(different) == 1:
        raise failure(different.pop()) from caught
    raise failure("; ".join(f"rank {r}: {reason}" for r, reason in failed.items())) from caught


def on_rank_zero(action: Callable[[], T], failure: type[Exception] = RanksDisagree) -> T:
    """Run ``action`` on rank 0 only and return its (picklable) result on every rank.  Collective.

    Raises:
        failure: on every rank, if the action raised.
    """
    rank, world_size = _world()
    answer: list[T | None] = [None]

    def act() -> None:
        if rank == 0:
            answer[0] = action()

    on_all_ranks(act, failure)
    if world_size > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]  # type: ignore[return-value]
