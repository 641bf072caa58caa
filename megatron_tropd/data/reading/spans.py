"""Parts of data files that can be read on their own, so that several processes share a file."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.data.reading.sources import DataFile

SPAN_BYTES = 64 << 20
"""Bytes of a JSONL span."""
SPAN_ROWS = 1 << 16
"""Rows of a span of a saved data set, and at least so many of a Parquet span (row groups are not divided)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A part of a file: from ``start`` to before ``stop``; None is the end.

    The unit is a byte of JSONL (a line belongs to the span in which it starts), a row group of Parquet, a row of a
    saved data set.  A compressed file or a JSON array is one span.
    """

    file: DataFile
    start: int = 0
    stop: int | None = None


def spans_of(file: DataFile) -> list[Span]:
    """Divide one file; no row is read.  A file that cannot be opened is one span: reading it reports why."""
    if file.kind == "jsonl" and not file.compression:
        with contextlib.suppress(OSError):
            return _cut(file, Path(file.path).stat().st_size, SPAN_BYTES)
    if file.kind == "parquet":
        return _row_groups(file)
    if file.kind == "saved":
        return _cut(file, _saved_rows(file), SPAN_ROWS)
    return [Span(file=file)]


def _cut(file: DataFile, size: int, step: int) -> list[Span]:
    starts = range(0, max(size, 1), step)
    return [Span(file=file, start=start, stop=start + step if start + step < size else None) for start in starts]


def _row_groups(file: DataFile) -> list[Span]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file.path)
    except (pyarrow.ArrowException, OSError):
        return [Span(file=file)]
    spans, start, rows = [], 0, 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= SPAN_ROWS and group + 1 < metadata.num_row_groups:
            spans.append(Span(file=file, start=start, stop=group + 1))
            start, rows = group + 1, 0
    return [*spans, Span(file=file, start=start)]


def _saved_rows(file: DataFile) -> int:
    import datasets

    try:
        return len(datasets.load_from_disk(file.path))
    except Exception:  # its errors have no common type; reading the span reports this one
        return 0
