"""What a form of data is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_tropd.data.reading.rows import Row
from tools.prompt_preparation.drafts import Draft
from tools.prompt_preparation.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One form of data."""

    name: str
    needs: tuple[frozenset[str], ...]
    """Sets of columns, one of which a file of this form has."""
    marks: tuple[frozenset[str], ...]
    """Sets of columns that no other form has: a file with one of them is of this form."""
    columns: frozenset[str]
    """Columns that are read."""
    read: Callable[[Row, Settings], Draft]
    """Raises Fault for a row that cannot be used, LeftOut for one that is not wanted."""


def sets(*columns: str) -> tuple[frozenset[str], ...]:
    """Return sets of columns from texts with spaces between the columns."""
    return tuple(frozenset(text.split()) for text in columns)
