"""Reads the rows of JSONL and Parquet files with their places.  Their content is interpreted in ``encode.py``."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MAX_LINE_BYTES = 16 << 20
"""A longer JSONL line is a bad row: tokenizing it would take minutes and it can only be a mistake."""
_SHOWN = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record and its place: file and line or row."""

    path: str
    line: int
    """Line number (JSONL) or row number (Parquet), from 1."""
    value: dict[str, object]
    keys: tuple[str, ...]
    """All keys of the record, including Parquet columns that were not read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """A record or, with line 0, a whole file that cannot be used."""

    path: str
    line: int
    found: str
    expected: str
    flag: str
    """The flag to change; "" if only a change of the file helps."""

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.line else self.path
        remedy = f"; see {self.flag}" if self.flag else ""
        return f"{place}: {self.found}; expected {self.expected}{remedy}"


class PromptError(ValueError):
    """The prompt files have bad rows; the message reports them, and ``rows`` holds all of them."""

    def __init__(self, rows: Sequence[BadRow]) -> None:
        self.rows = tuple(rows)
        lines = [f"prompts: {len(self.rows)} problem{'s' * (len(self.rows) != 1)} in the prompt data"]
        lines += [f"  {row}" for row in self.rows[:_SHOWN]]
        if len(self.rows) > _SHOWN:
            lines.append(f"  ... and {len(self.rows) - _SHOWN} more")
        if all(row.line for row in self.rows):
            lines.append("mend the rows, or leave them out with --on-bad-row skip")
        super().__init__("\n".join(lines))


def show(value: object, limit: int = 60) -> str:
    """Return ``value`` as a short ASCII text for an error message."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    """Yield the records of one file in order, read by its suffix.  Bad content is yielded as a BadRow, never raised.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file.
        columns: the keys that are needed; other columns of a Parquet file are not read.
    """
    path = Path(path)
    if path.suffix.lower() not in (".jsonl", ".parquet"):
        yield _bad_file(path, f"unknown suffix {show(path.suffix)}", "a .jsonl or .parquet file")
    elif not path.is_file():
        found = "a directory" if path.is_dir() else "no such file"
        yield _bad_file(path, found, "a .jsonl or .parquet file")
    else:
        try:
            yield from _read_jsonl(path) if path.suffix.lower() == ".jsonl" else _read_parquet(path, columns)
        except OSError as error:
            yield _bad_file(path, f"cannot be read ({error})", "a readable file")


def _bad_file(path: Path, found: str, expected: str) -> BadRow:
    return BadRow(path=str(path), line=0, found=found, expected=expected, flag="--prompt-data")


def _read_jsonl(path: Path) -> Iterator[Row | BadRow]:
    with path.open("rb") as file:
        line = 0
        # Bytes, split at \n only: text mode also splits at \r, and one bad byte would lose the line number.
        while raw := file.readline(MAX_LINE_BYTES + 1):
            line += 1
            complete = raw.endswith(b"\n")
            if line == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
                if not raw:
                    return
            if len(raw) > MAX_LINE_BYTES and not complete:
                while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
                found, expected = f"a line of more than {MAX_LINE_BYTES} bytes", f"at most {MAX_LINE_BYTES}"
                yield BadRow(path=str(path), line=line, found=found, expected=expected, flag="")
            else:
                yield _parse_json(path, line, raw)


def _parse_json(path: Path, line: int, raw: bytes) -> Row | BadRow:
    """Return one JSONL line as a record."""

    def bad(found: str, expected: str = "one JSON object a line") -> BadRow:
        return BadRow(path=str(path), line=line, found=found, expected=expected, flag="")

    if not raw.strip():
        return bad("an empty line")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return bad(f"byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8", "UTF-8 text")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return bad(f"broken JSON ({error.msg} at column {error.colno}): {show(text.strip())}")
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, or very deep nesting
        return bad(f"unreadable JSON ({error})")
    if not isinstance(value, dict):
        return bad(f"a JSON {type(value).__name__}: {show(value)}")
    return Row(path=str(path), line=line, value=value, keys=tuple(value))


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[Row | BadRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        remedy = "pyarrow for Parquet files: pip install 'megatron-tropd[parquet]', or a .jsonl file"
        yield _bad_file(path, "pyarrow is not installed", remedy)
        return
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            keys = tuple(file.schema_arrow.names)
            line = 0
            for batch in file.iter_batches(batch_size=1024, columns=[name for name in columns if name in keys]):
                for index in range(batch.num_rows):
                    line += 1
                    yield _parquet_row(path, line, batch, index, keys)
    except pyarrow.ArrowException as error:
        yield _bad_file(path, f"unreadable Parquet ({error})", "a complete Parquet file")


def _parquet_row(path: Path, line: int, batch: object, index: int, keys: tuple[str, ...]) -> Row | BadRow:
    try:
        value = {name: batch.column(name)[index].as_py() for name in batch.schema.names}  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:  # Arrow does not check the strings of a file
        found = f"byte 0x{error.object[error.start]:02x} at offset {error.start} is not UTF-8"
        return BadRow(path=str(path), line=line, found=found, expected="UTF-8 text", flag="")
    return Row(path=str(path), line=line, value=value, keys=keys)
