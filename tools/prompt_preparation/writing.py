"""The spool, the shards, and an output that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tools.prompt_preparation.settings import Settings, UsageError

Record = dict[str, Any]
"""A row by its columns."""
_GROUP_ROWS = 8192
_GROUP_CHARACTERS = 32 << 20
"""A row group is written at so many rows or characters, so that rows with long tests or responses fit memory."""
REPORT, DROPPED, CARD = "report.json", "dropped.jsonl", "README.md"
_MESSAGES = pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())]))
_SPOOLED = [
    pa.field("row", pa.string()),
    pa.field("prompt_length", pa.int64()),
    pa.field("response_length", pa.int64()),
]


def schema_of(form: str, responses: bool) -> pa.Schema:
    """Return the columns of the output; ``form`` is "messages" or "text"."""
    names = (*(("response",) if responses else ()), "answer", "grader", "domain", "uid", "source_uid")
    prompt = pa.field("prompt", _MESSAGES if form == "messages" else pa.string())
    return pa.schema([prompt, *(pa.field(name, pa.string()) for name in names)])


class ParquetRows:
    """A Parquet file that is written row by row; on the disk when ``close`` returns."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._schema = path, schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._waiting: list[Record] = []
        self._characters = 0

    def write(self, record: Record) -> None:
        """Add a row; columns that the schema does not have are left out."""
        self._waiting.append(record)
        self._characters += _size(record)
        if len(self._waiting) == _GROUP_ROWS or self._characters >= _GROUP_CHARACTERS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
            self._waiting, self._characters = [], 0

    def close(self) -> None:
        """Write what is left."""
        try:
            self._flush()
        finally:
            self._writer.close()
        _sync(self._path)


class JsonRows:
    """A JSONL file that is written row by row."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path, self._names = path, schema.names
        self._file = path.open("w", encoding="utf-8", newline="\n")

    def write(self, record: Record) -> None:
        """Add a row."""
        self._file.write(json.dumps({name: record[name] for name in self._names}, ensure_ascii=False) + "\n")

    def close(self) -> None:
        """Write what is left."""
        self._file.close()
        _sync(self._path)


class Spool:
    """The rows that the first pass keeps, with what the second needs to know of them."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        self._path = path
        self._rows = ParquetRows(path, pa.schema([*schema, *_SPOOLED]))
        self.write, self.close = self._rows.write, self._rows.close

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order, once the spool is closed."""
        with pq.ParquetFile(self._path) as file:
            yield from file.iter_batches(batch_size=256, columns=columns)


def _size(record: Record) -> int:
    prompt = record["prompt"]
    size = len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
    return size + sum(len(record.get(name) or "") for name in ("response", "answer"))


def _sync(path: Path) -> None:
    """Wait until a file is on the disk: some file systems say only then that they are full."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    path.write_text(text, encoding="utf-8", newline="\n")
    _sync(path)


# ---- the output ----


def check_free(settings: Settings) -> None:
    """Raise UsageError if something is where the output goes."""
    for path in reversed(_places(settings).values()):
        if os.path.lexists(path):
            raise UsageError(
                f"--save {settings.save}: {path} exists; nothing is overwritten: remove it or save elsewhere"
            )


def _places(settings: Settings) -> dict[str, Path]:
    """Return where each part of the output goes, by its name in the staging directory; the rows last."""
    save = Path(settings.save)
    if not settings.is_file:
        return {"out": save}
    beside = {
        name: save.with_suffix(f".{name}") for name in (REPORT, DROPPED) if name == REPORT or settings.write_dropped
    }
    return {**{f"out/{name}": path for name, path in beside.items()}, f"out/{save.name}": save}


@contextlib.contextmanager
def staging(settings: Settings) -> Iterator[Path]:
    """Give a directory on the file system of the output, in which ``out`` is made; it is gone afterwards.

    Raises:
        OSError: it cannot be made.
    """
    save = Path(settings.save)
    directory = save.parent / f".{save.name}.{os.getpid()}"
    save.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir()
    try:
        (directory / "out").mkdir()
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(directory: Path, settings: Settings) -> None:
    """Move the finished output to its place.

    Raises:
        UsageError: something came there meanwhile.
        OSError: it cannot be moved; no part of it is left at its place.
    """
    check_free(settings)
    with contextlib.ExitStack() as undo:
        for name, path in _places(settings).items():
            os.rename(directory / name, path)
            undo.callback(os.rename, path, directory / name)
        undo.pop_all()


def write_rows(directory: Path, settings: Settings, schema: pa.Schema, records: Iterable[Record], count: int) -> None:
    """Write the rows into ``directory``: ``count`` of them, as one file or in shards.

    Raises:
        OSError: they cannot be written.
    """
    if settings.is_file:
        kind = JsonRows if settings.save.endswith(".jsonl") else ParquetRows
        shards = [(kind, directory / Path(settings.save).name, count)]
    else:
        number = -(-count // settings.shard_rows)
        (directory / "data").mkdir()
        paths = [directory / "data" / f"train-{index:05d}-of-{number:05d}.parquet" for index in range(number)]
        sizes = [min(settings.shard_rows, count - index * settings.shard_rows) for index in range(number)]
        shards = [(ParquetRows, path, size) for path, size in zip(paths, sizes, strict=True)]
    stream = iter(records)
    for kind, path, size in shards:
        rows = kind(path, schema)
        with contextlib.closing(rows):
            for _ in range(size):
                rows.write(next(stream))
    for _ in stream:  # rows after the last that is written are left out
        raise AssertionError("more rows than were counted")
