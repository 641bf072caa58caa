"""The rows of a span, with their places.  What cannot be read is yielded as a BadRow and never raised."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from megatron_tropd.data.reading.rows import BadRow, Row, kind_of, show
from megatron_tropd.data.reading.sources import DataFile
from megatron_tropd.data.reading.spans import Span

MAX_LINE_BYTES = 16 << 20
"""A longer JSONL line is a bad row: tokenizing it would take minutes and it can only be a mistake."""
MAX_RATIO = 100
"""A compressed JSON array that is more times larger than its file is not read: it has to be in memory as a whole."""
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_BATCH = 1024
_ONE_A_LINE = "one JSON object a line"


def read_span(span: Span, columns: Collection[str]) -> Iterator[Row | BadRow]:
    """Yield the records of a span in order; their lines are counted from 1 at the start of the span.

    Args:
        span: what to read.
        columns: the top-level keys that are needed; other columns of Parquet files and saved data sets are not read.
    """
    file = span.file
    try:
        if file.kind == "jsonl":
            yield from _read_jsonl(span)
        elif file.kind == "json":
            yield from _read_json(span)
        elif file.kind == "parquet":
            yield from _read_parquet(span, columns)
        else:
            yield from _read_saved(span, columns)
    except _UNREADABLE as error:
        text = str(error) or type(error).__name__
        yield bad_file(file, f"cannot be read ({text})", "a complete, readable file")


def bad_file(file: DataFile, found: str, expected: str, flag: str = "--prompt-data") -> BadRow:
    """Return the report about a whole file."""
    return BadRow(path=file.path, line=0, found=found, expected=expected, flag=flag)


def _zstd(path: str) -> IO[bytes]:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


_OPENERS: dict[str, Callable[[str], Any]] = {
    "": partial(open, mode="rb"), ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd,
}  # fmt: skip


@contextlib.contextmanager
def _opened(file: DataFile) -> Iterator[IO[bytes]]:
    with _OPENERS[file.compression](file.path) as opened:
        yield opened


# ---- JSON ----


def _lines(span: Span) -> Iterator[bytes | None]:
    """Yield the lines that start in the span, without their byte order mark; None for one that is too long.

    Bytes, split at \\n only: text mode also splits at \\r, and one bad byte would lose the line number.
    """
    with _opened(span.file) as file:
        position = span.start
        if position:
            file.seek(position - 1)  # where the line before ends exactly here, this reads its newline only
            position += _skip_line(file) - 1
        while (span.stop is None or position < span.stop) and (raw := file.readline(MAX_LINE_BYTES + 1)):
            at, position = position, position + len(raw)
            too_long = len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n")
            if too_long:
                position += _skip_line(file)
            if not at:
                raw = raw.removeprefix(codecs.BOM_UTF8)
                if not raw:
                    return
            yield None if too_long else raw


def _skip_line(file: IO[bytes]) -> int:
    """Read to the end of the line; returns the number of bytes read."""
    count = 0
    while rest := file.readline(MAX_LINE_BYTES):
        count += len(rest)
        if rest.endswith(b"\n"):
            break
    return count


def _read_jsonl(span: Span) -> Iterator[Row | BadRow]:
    path = span.file.path
    blank = range(1, 1)  # lines that are empty; those at the end of a file are no rows
    for line, raw in enumerate(_lines(span), start=1):
        if raw is not None and not raw.strip():
            blank = range(blank.start if blank else line, line + 1)
            continue
        yield from _empty_lines(path, blank)
        blank = range(1, 1)
        if raw is None:
            found, expected = f"a line of more than {MAX_LINE_BYTES} bytes", f"at most {MAX_LINE_BYTES}"
            yield BadRow(path=path, line=line, found=found, expected=expected, flag="")
        else:
            yield _parse_line(path, line, raw)
    if span.stop is not None:
        yield from _empty_lines(path, blank)


def _empty_lines(path: str, lines: Iterable[int]) -> Iterator[BadRow]:
    for line in lines:
        yield BadRow(path=path, line=line, found="an empty line", expected=_ONE_A_LINE, flag="")


class _Refused(ValueError):
    """A text that is JSON for Python's reader, but whose meaning is not clear."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"the key {show(twice, 30)} twice in one object")
    return value


def _parse(raw: bytes) -> Any:
    return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)


def _parse_line(path: str, line: int, raw: bytes) -> Row | BadRow:
    """Return one JSONL line as a record."""
    try:
        value = _parse(raw)
    except (ValueError, RecursionError) as error:
        found, expected = _json_fault(error, raw, _ONE_A_LINE)
        return BadRow(path=path, line=line, found=found, expected=expected, flag="")
    return _record(path, line, value, _ONE_A_LINE)


def _record(path: str, line: int, value: object, expected: str) -> Row | BadRow:
    if not isinstance(value, dict):
        found = kind_of(value, "a JSON")
        return BadRow(path=path, line=line, found=found, expected=expected, flag="")
    return Row(path=path, line=line, value=value, keys=tuple(value))


def _json_fault(error: Exception, raw: bytes, expected: str) -> tuple[str, str]:
    """Return what was found and what was expected, of bytes that are not JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8", "UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        text = raw[:2000].decode("utf-8", errors="replace").strip()
        return f"broken JSON ({error.msg} at column {error.colno}): {show(text)}", expected
    if isinstance(error, _Refused):
        return str(error), "every key once"
    return f"unreadable JSON ({error})", expected  # an integer of thousands of digits, or very deep nesting


def _read_json(span: Span) -> Iterator[Row | BadRow]:
    """Read a ``.json`` file: an array of objects, or one object a line (many such files are named so)."""
    path = span.file.path
    most = MAX_RATIO * Path(path).stat().st_size + MAX_LINE_BYTES if span.file.compression else -1
    with _opened(span.file) as file:
        raw = file.read(most).removeprefix(codecs.BOM_UTF8)
        if most >= 0 and file.read(1):
            found, expected = f"more than {most} bytes when decompressed", f"at most {MAX_RATIO} times its size"
            yield bad_file(span.file, found, expected)
            return
    expected = "an array of JSON objects, or one object a line"
    if not raw.strip():
        return
    first, _, rest = raw.lstrip().partition(b"\n")
    try:
        value = _parse(raw)
    except (ValueError, RecursionError) as error:
        if raw.lstrip().startswith(b"{") and rest.strip() and isinstance(_parse_line(path, 1, first), Row):
            yield from _read_jsonl(span)
            return
        found, expected = _json_fault(error, raw, expected)
        yield bad_file(span.file, found, expected, "")
        return
    if isinstance(value, dict) and not rest.strip():  # one line, which is one row
        yield _record(path, 1, value, expected)
    elif isinstance(value, list):
        for number, record in enumerate(value, start=1):
            yield _record(path, number, record, "an array of JSON objects")
    else:
        yield bad_file(span.file, kind_of(value, "a JSON"), expected, "")


# ---- Arrow ----


def _read_parquet(span: Span, columns: Collection[str]) -> Iterator[Row | BadRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(span.file.path) as file:
            groups = list(range(span.start, file.num_row_groups if span.stop is None else span.stop))
            keys = tuple(file.schema_arrow.names)
            wanted = [name for name in keys if name in columns]
            batches = file.iter_batches(batch_size=_BATCH, row_groups=groups, columns=wanted)
            yield from _batch_rows(span.file, batches, keys)
    except pyarrow.ArrowException as error:
        yield bad_file(span.file, f"unreadable Parquet ({error})", "a complete Parquet file")


def _read_saved(span: Span, columns: Collection[str]) -> Iterator[Row | BadRow]:
    import datasets

    try:
        whole = datasets.load_from_disk(span.file.path)
        keys = tuple(whole.column_names)
        stop = len(whole) if span.stop is None else span.stop
        part = whole.select(range(span.start, stop)).select_columns([name for name in keys if name in columns])
        tables = part.with_format("arrow").iter(batch_size=_BATCH)
        yield from _batch_rows(span.file, (batch for table in tables for batch in _valid_batches(table)), keys)
    except Exception as error:  # its errors have no common type
        text = (str(error) or type(error).__name__).splitlines()[0]
        yield bad_file(span.file, f"unreadable data set ({text})", "what Dataset.save_to_disk writes")


def _valid_batches(table: Any) -> list[Any]:
    """Return the batches of a table, which was mapped from a file as it is: its offsets may point anywhere.

    Raises:
        pyarrow.ArrowInvalid: they do.
    """
    table.validate(full=True)
    return table.to_batches()  # type: ignore[no-any-return]


def _batch_rows(file: DataFile, batches: Iterable[Any], keys: tuple[str, ...]) -> Iterator[Row | BadRow]:
    line = 0
    for batch in batches:
        for index in range(batch.num_rows):
            line += 1
            yield _arrow_row(file.path, line, batch, index, keys)


def _arrow_row(path: str, line: int, batch: Any, index: int, keys: tuple[str, ...]) -> Row | BadRow:
    value = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[name] = column[index].as_py()
        except UnicodeDecodeError as error:  # Arrow does not check the strings of a file
            found = f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8"
            return BadRow(path=path, line=line, found=found, expected="UTF-8 text", flag="")
        except (ValueError, OverflowError, KeyError):  # a date that Python does not have, a time zone that nobody knows
            found = f"a {column.type} in column {show(name)} that cannot be read"
            return BadRow(path=path, line=line, found=found, expected="text, numbers, lists or objects", flag="")
    return Row(path=path, line=line, value=value, keys=keys)


def shifted(item: BadRow, lines: int) -> BadRow:
    """Return the same report ``lines`` further on in the file; one about the whole file is returned as it is."""
    return replace(item, line=item.line + lines) if item.line else item
