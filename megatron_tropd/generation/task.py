"""What a writer is asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The samples of one prompt that have to be written."""

    number: int
    """Of the prompt (:class:`SourcePrompt`)."""
    random_uid: int
    """The integer that decides its random numbers."""
    token_ids: tuple[int, ...]
    samples: tuple[int, ...]
