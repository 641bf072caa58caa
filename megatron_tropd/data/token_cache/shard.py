"""One shard of a token cache: the usable rows of one span as an Arrow file, and a JSON file about the other rows.

Every file is written under another name and renamed when it is complete, the JSON file last, so that a shard whose
JSON file exists is whole, whenever a process was killed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_tropd.atomic_files import replacing
from megatron_tropd.data.encoding.encode import EncodedRow, Encoder
from megatron_tropd.data.reading.readers import read_span
from megatron_tropd.data.reading.rows import BadRow, Row
from megatron_tropd.data.reading.spans import Span
from megatron_tropd.json_files import as_dataclass, read_json_object

BATCH_ROWS = 1024
"""Rows of every record batch of a shard but the last, so that the batch of a row is known without an index."""
MAX_DETAILS = 1000
"""Bad rows of a shard that are kept in detail; of more, only the number is known."""
_FILE_FAULT = 0

SCHEMA = pa.schema(
    [
        pa.field("line", pa.int64()),  # from 1, in the span
        pa.field("uid", pa.int64()),  # null unless the row gives an integer
        pa.field("name", pa.string()),  # null unless the row gives a text as its uid
        pa.field("prompt", pa.list_(pa.int32())),
        pa.field("response", pa.list_(pa.int32())),  # null where there is none
        pa.field("response_len", pa.int64()),
        pa.field("answer", pa.string()),
        pa.field("grader", pa.string()),
        pa.field("domain", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """What is known of a shard besides its usable rows."""

    path: str
    """The file of the span."""
    rows: int
    """Records that were read, usable or not."""
    kept: int
    dropped: int
    """Rows left out because their response is too long (--on-long-response skip)."""
    faults: int
    details: tuple[BadRow, ...] = field(default=())
    """The first bad rows; lines count from 1 in the span, and 0 is the whole file."""
    num_bytes: int
    """Size of the Arrow file."""


def arrow_path(directory: Path, index: int) -> Path:
    """Return the Arrow file of a shard."""
    return directory / f"{index:05d}.arrow"


def read_record(directory: Path, index: int) -> ShardRecord | None:
    """Return the record of a finished shard; None if it is not finished, or damaged."""
    try:
        record = as_dataclass(ShardRecord, read_json_object(directory / f"{index:05d}.json"), "the record")
        return record if arrow_path(directory, index).stat().st_size == record.num_bytes else None
    except (OSError, ValueError):
        return None


def write_record(directory: Path, index: int, record: ShardRecord) -> None:
    """Write the JSON file of a shard, which makes it a finished one."""
    with replacing(directory / f"{index:05d}.json") as path:
        path.write_text(json.dumps(asdict(record)), encoding="utf-8")


def make_shard(directory: Path, index: int, span: Span, encoder: Encoder) -> None:
    """Read, encode and write the rows of one span.

    Raises:
        OSError: the files cannot be written.
    """
    maker = _Maker(span, encoder)
    with replacing(arrow_path(directory, index)) as path:
        write_rows(path, maker.encoded())
        num_bytes = path.stat().st_size
    record = ShardRecord(
        path=span.file.path, rows=maker.rows, kept=maker.kept, dropped=maker.dropped, faults=maker.faults,
        details=tuple(maker.details), num_bytes=num_bytes,
    )  # fmt: skip
    write_record(directory, index, record)


class _Maker:
    """Encodes a span, and counts what it leaves out."""

    def __init__(self, span: Span, encoder: Encoder) -> None:
        self._span, self._encoder = span, encoder
        self.rows = self.kept = self.dropped = self.faults = 0
        self.details: list[BadRow] = []

    def encoded(self) -> Iterator[EncodedRow]:
        """Yield the usable rows."""
        waiting: list[Row] = []
        for item in read_span(self._span, self._encoder.fmt.columns):
            if isinstance(item, BadRow):
                self.rows += item.line != _FILE_FAULT
                self._bad(item)
                continue
            self.rows += 1
            waiting.append(item)
            if len(waiting) == BATCH_ROWS:
                yield from self._settle(waiting)
                waiting = []
        yield from self._settle(waiting)

    def _settle(self, rows: Sequence[Row]) -> Iterator[EncodedRow]:
        for result in self._encoder.encode(rows):
            if isinstance(result, EncodedRow):
                self.kept += 1
                yield result
            elif result is None:
                self.dropped += 1
            else:
                self._bad(result)

    def _bad(self, row: BadRow) -> None:
        self.faults += 1
        if len(self.details) < MAX_DETAILS or row.line == _FILE_FAULT:
            self.details.append(row)


def write_rows(path: Path, rows: Iterable[EncodedRow]) -> None:
    """Write encoded rows as an Arrow file of record batches of ``BATCH_ROWS`` rows."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        waiting: list[EncodedRow] = []
        for row in rows:
            waiting.append(row)
            if len(waiting) == BATCH_ROWS:
                writer.write_batch(_batch(waiting))
                waiting = []
        if waiting:
            writer.write_batch(_batch(waiting))


def _batch(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    columns: list[Any] = [
        pa.array([row.line for row in rows], pa.int64()),
        pa.array([row.uid if isinstance(row.uid, int) else None for row in rows], pa.int64()),
        pa.array([row.uid if isinstance(row.uid, str) else None for row in rows], pa.string()),
        _lists([row.prompt_ids for row in rows]),
        _lists([row.response_ids for row in rows]),
        pa.array([row.response_len for row in rows], pa.int64()),
        pa.array([row.answer for row in rows], pa.string()),
        pa.array([row.grader for row in rows], pa.string()),
        pa.array([row.domain for row in rows], pa.string()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _lists(values: Sequence[np.ndarray | None]) -> pa.Array:
    """Return a list array of token ids; None becomes null."""
    lengths = [0 if value is None else len(value) for value in values]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = [value for value in values if value is not None]
    flat = np.concatenate(tokens) if tokens else np.empty(0, np.int32)
    mask = pa.array([value is None for value in values], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()), mask=mask)
