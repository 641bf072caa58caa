"""The rank that speaks to the servers, as all ranks see it: what it finds out, everybody gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_tropd.rollout.engine import EngineError

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Failure:
    """What it tells the others when its work failed."""

    reason: str


def reason(error: Exception) -> str:
    """An error in a message; the type only where the text may not explain itself."""
    return str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstRank:
    """``broadcast``: the first rank's value on every rank, whatever the others pass."""

    rank: int
    broadcast: Callable[[Any], Any]

    @property
    def is_me(self) -> bool:
        """Whether this process is it."""
        return self.rank == 0

    def ask(self, work: Callable[[], T]) -> T:
        """What ``work`` returns there, on every rank; it is called nowhere else.  Collective.

        Raises:
            EngineError: on every rank, whatever ``work`` raised.
        """
        answer: Any = None
        if self.is_me:
            try:
                answer = work()
            except Exception as error:  # of any kind: the other ranks wait in the broadcast
                log.debug("the first rank failed", exc_info=True)
                answer = _Failure(reason(error))
        answer = self.broadcast(answer)
        if isinstance(answer, _Failure):
            raise EngineError(answer.reason)
        return answer  # type: ignore[no-any-return]
