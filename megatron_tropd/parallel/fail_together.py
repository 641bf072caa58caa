"""Run actions so that a failure on one rank raises the same error on every rank.

A rank that raised alone would leave the others waiting in the next collective until its timeout.  So code that may fail
between two collectives runs through one of three functions, which differ in where it runs and where results go:

    on_all_ranks      runs on every rank; each rank gets its own result
    from_all_ranks    runs on every rank; each rank gets all results
    on_rank_zero      runs on rank 0; each rank gets its result

``share_out`` is ``from_all_ranks`` for a list of items, of which each rank takes its share.  All are collective over
the world, and work without a process group, where the world is one rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from megatron_tropd.parallel.exchange import broadcast_object, gather_objects

log = logging.getLogger(__name__)

T = TypeVar("T")
Item = TypeVar("Item")
Failure = Callable[[str], Exception]
"""Makes the error that every rank raises, from the reasons of the ranks that failed."""


class RankFailure(RuntimeError):
    """An action failed on some rank; the message gives the reason, or each rank's if the reasons differ."""


class FailedElsewhere(RuntimeError):
    """Raised by an action that failed only because another rank did; it is left out of the reported reasons."""


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """Result of an action on one rank."""

    value: T | None = None
    reason: str | None = None
    """Why the action failed; None if it did not, empty if it failed only because another rank did."""


def _explains_itself(error: Exception, failure: Failure) -> bool:
    """Return whether the text of ``error`` says what is wrong without its type and its traceback."""
    return isinstance(error, (ValueError, OSError, *([failure] if isinstance(failure, type) else [])))


def reason_of(error: Exception, failure: Failure = RankFailure) -> str:
    """Return the text of an error, preceded by its type if the text may not be clear alone; "" for FailedElsewhere."""
    if isinstance(error, FailedElsewhere):
        return ""
    text = str(error) or type(error).__name__
    return text if _explains_itself(error, failure) else f"{type(error).__name__}: {text}"


def _attempt(action: Callable[[], T], failure: Failure) -> tuple[_Outcome[T], Exception | None]:
    try:
        return _Outcome(value=action()), None
    except Exception as error:  # of any kind: the other ranks wait for the outcome
        # The caller may handle the common error and go on, so the traceback of a programming error is kept here.
        expected = _explains_itself(error, failure) or isinstance(error, RuntimeError)
        log.log(logging.DEBUG if expected else logging.ERROR, "failed on this rank", exc_info=True)
        return _Outcome(reason=reason_of(error, failure)), error


def _raise_if_any(reasons: Mapping[int, str], failure: Failure, caught: Exception | None) -> None:
    if not reasons:
        return
    told = {rank: reason for rank, reason in reasons.items() if reason} or reasons
    different = set(told.values())
    if len(different) == 1:
        raise failure(different.pop()) from caught
    raise failure("; ".join(f"rank {rank}: {reason}" for rank, reason in told.items())) from caught


def on_all_ranks(action: Callable[[], T], failure: Failure = RankFailure) -> T:
    """Run ``action`` on every rank and return this rank's result.

    The action itself may be collective only if it fails on all ranks or on none.

    Raises:
        failure: on every rank, if the action raised on any rank.
    """
    outcome, caught = _attempt(action, failure)
    reasons = {rank: reason for rank, reason in enumerate(gather_objects(outcome.reason)) if reason is not None}
    _raise_if_any(reasons, failure, caught)
    return outcome.value  # type: ignore[return-value]


def from_all_ranks(action: Callable[[], T], failure: Failure = RankFailure) -> list[T]:
    """Run ``action`` on every rank and return the (picklable) results of all ranks, by rank.

    Raises:
        failure: on every rank, if the action raised on any rank.
    """
    mine, caught = _attempt(action, failure)
    outcomes: list[_Outcome[T]] = gather_objects(mine)
    reasons = {rank: outcome.reason for rank, outcome in enumerate(outcomes) if outcome.reason is not None}
    _raise_if_any(reasons, failure, caught)
    return [outcome.value for outcome in outcomes]  # type: ignore[misc]


def share_out(
    items: Sequence[Item], action: Callable[[Sequence[Item]], Sequence[T]], failure: Failure = RankFailure
) -> list[T]:
    """Run ``action`` on each rank's share of the items, and return the (picklable) results in the order of the items.

    Rank r takes the items r, r + world size, r + 2 world size and so on; ``action`` returns a result for each.

    Raises:
        failure: on every rank, if the action raised on any rank.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = from_all_ranks(lambda: action(items[rank::size]), failure)
    return [parts[index % size][index // size] for index in range(len(items))]


def on_rank_zero(action: Callable[[], T], failure: Failure = RankFailure) -> T:
    """Run ``action`` on rank 0 alone and return its (picklable) result on every rank.

    Raises:
        failure: on every rank, if the action raised.
    """
    outcome: Any = None
    caught = None
    if is_rank_zero():
        outcome, caught = _attempt(action, failure)
    outcome = broadcast_object(outcome)
    if outcome.reason is not None:
        raise failure(outcome.reason or "failed on another rank") from caught
    return outcome.value  # type: ignore[no-any-return]


def is_rank_zero() -> bool:
    """Return whether this process is the rank on which :func:`on_rank_zero` runs its action."""
    return not dist.is_initialized() or dist.get_rank() == 0
