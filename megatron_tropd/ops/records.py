"""Operations on every tensor of a record (a dataclass of tensors and records)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")


def map_tensors(record: Record, change: Callable[[Tensor], Tensor]) -> Record:
    """A new ``record`` with ``change`` applied to its tensors, also in nested records; None stays None."""
    return type(record)(**{name: _change(getattr(record, name), change) for name in _fields(record)})


def _change(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if value is None:
        return None
    return change(value) if isinstance(value, Tensor) else map_tensors(value, change)


def cat_records(records: Sequence[Record]) -> Record:
    """One record made of the records of consecutive rows."""
    first = records[0]
    parts = {name: [getattr(record, name) for record in records] for name in _fields(first)}
    return type(first)(**{name: _cat(values) for name, values in parts.items()})


def _cat(values: list[Any]) -> Any:
    if values[0] is None:
        return None
    return torch.cat(values) if isinstance(values[0], Tensor) else cat_records(values)


def _fields(record: Any) -> Any:
    return type(record).__dataclass_fields__
