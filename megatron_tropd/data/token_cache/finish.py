"""What is known only of all shards together: uids, rows with a uid twice, the digest, and counts."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from megatron_tropd.data.reading.readers import shifted
from megatron_tropd.data.reading.rows import BadRow, show
from megatron_tropd.data.token_cache.shard import (
    BATCH_ROWS,
    MAX_DETAILS,
    ShardRecord,
    arrow_path,
    replacing,
    write_record,
)
from megatron_tropd.json_files import as_dataclass, read_json_object

_UNIQUE = "a uid of its own for every row (or no uid in any)"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCounts:
    """How many rows of one file are usable, bad, and left out because of their length."""

    kept: int = 0
    faults: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The finished cache: what is read of it at the start of a run."""

    kept: tuple[int, ...]
    """Usable rows, by shard."""
    files: Mapping[str, FileCounts]
    """By path."""
    num_rows: int
    """Records that were read, usable or not."""
    num_responses: int
    num_cut: int
    """Responses of which only the first tokens were kept."""
    num_answers: int
    num_dropped: int
    """Rows left out because their response is too long."""
    num_faults: int
    details: tuple[BadRow, ...]
    """The first bad rows, and every file that cannot be read, in the order of the files."""
    digest: str
    """sha256 over uids, prompt ids and teacher response ids; answers, graders and domains are not included."""
    is_sorted: bool
    """Whether uids increase from row to row."""


def finish(directory: Path, records: Sequence[ShardRecord]) -> Summary:
    """Number the rows, leave out those whose uid was given before, and write ``uids.npy`` and ``summary.json``.

    Raises:
        OSError: a file cannot be written.
    """
    first_lines = _first_lines(records)
    repeated = _repeated(directory, records, first_lines)
    records = [_without(directory, index, record, repeated) for index, record in enumerate(records)]
    parts = [_uids(directory, index, records) for index in range(len(records))]
    uids = np.concatenate([np.empty(0, np.int64), *parts])
    with replacing(directory / "uids.npy") as path, path.open("wb") as file:
        np.save(file, uids)
    is_sorted = bool((np.diff(uids) > 0).all())
    if not is_sorted:
        with replacing(directory / "uid_order.npy") as path, path.open("wb") as file:
            np.save(file, np.argsort(uids, kind="stable"))
    counts = _count(directory, records, parts)
    numbered = zip(records, first_lines, strict=True)
    summary = Summary(
        kept=tuple(record.kept for record in records),
        files=_by_file(records),
        num_rows=sum(record.rows for record in records),
        num_dropped=sum(record.dropped for record in records),
        num_faults=sum(record.faults for record in records),
        details=tuple(shifted(row, first) for record, first in numbered for row in record.details),
        is_sorted=is_sorted,
        num_responses=counts.responses,
        num_cut=counts.cut,
        num_answers=counts.answers,
        digest=counts.digest,
    )
    with replacing(directory / "summary.json") as path:
        path.write_text(json.dumps(asdict(summary)), encoding="utf-8")
    return summary


def read_summary(directory: Path) -> Summary | None:
    """Return the summary of a finished cache; None if it is not finished, or damaged."""
    try:
        return as_dataclass(Summary, read_json_object(directory / "summary.json"), "the summary")
    except (OSError, ValueError):
        return None


def _by_file(records: Sequence[ShardRecord]) -> dict[str, FileCounts]:
    counts: dict[str, FileCounts] = {}
    for record in records:
        so_far = counts.get(record.path, FileCounts())
        counts[record.path] = FileCounts(
            kept=so_far.kept + record.kept, faults=so_far.faults + record.faults,
            dropped=so_far.dropped + record.dropped,
        )  # fmt: skip
    return counts


def _first_lines(records: Sequence[ShardRecord]) -> list[int]:
    """Return how many records of its file precede each shard."""
    first: dict[str, int] = {}
    result = []
    for record in records:
        result.append(first.get(record.path, 0))
        first[record.path] = result[-1] + record.rows
    return result


def _tables(directory: Path, index: int) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(arrow_path(directory, index))) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def _uids(directory: Path, index: int, records: Sequence[ShardRecord]) -> np.ndarray:
    """Return the uids of one shard [kept] int64: given by the row, or else its number among all records."""
    before = sum(record.rows for record in records[:index])
    parts = [
        pc.fill_null(batch["uid"], 0).to_numpy(zero_copy_only=False)
        + np.where(pc.is_null(batch["uid"]).to_numpy(zero_copy_only=False), batch["line"].to_numpy() - 1 + before, 0)
        for batch in _tables(directory, index)
    ]
    return np.concatenate([np.empty(0, np.int64), *parts])


# ---- uids that are given twice ----


def _repeated(
    directory: Path, records: Sequence[ShardRecord], first_lines: Sequence[int]
) -> dict[int, dict[int, BadRow]]:
    """Return the rows whose uid an earlier row has: shard -> place in the shard -> report."""
    uids = np.concatenate([np.empty(0, np.int64), *(_uids(directory, i, records) for i in range(len(records)))])
    names = pa.chunked_array(
        [batch["name"] for index in range(len(records)) for batch in _tables(directory, index)], pa.string()
    )
    twice: dict[int, tuple[int, object]] = {}
    order = np.argsort(uids, kind="stable")
    ordered = uids[order]
    for place in np.flatnonzero(np.diff(ordered) == 0) + 1:
        first = np.searchsorted(ordered, ordered[place])
        twice[int(order[place])] = int(order[first]), int(ordered[place])
    if names.null_count < len(names):
        seen: dict[str, int] = {}
        for number, name in enumerate(itertools.chain.from_iterable(chunk.to_pylist() for chunk in names.chunks)):
            if name is not None and seen.setdefault(name, number) != number:
                twice[number] = seen[name], name
    return _reports(directory, records, first_lines, twice) if twice else {}


def _reports(
    directory: Path, records: Sequence[ShardRecord], first_lines: Sequence[int], twice: dict[int, tuple[int, object]]
) -> dict[int, dict[int, BadRow]]:
    starts = np.cumsum([0, *(record.kept for record in records)])

    def place(number: int) -> tuple[int, int, int]:
        """Shard, place in it, and line in the span."""
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        row = number - int(starts[shard])
        batch = next(itertools.islice(_tables(directory, shard), row // BATCH_ROWS, None))
        return shard, row, int(batch["line"][row % BATCH_ROWS].as_py())

    found: dict[int, dict[int, BadRow]] = {}
    for number, (earlier, uid) in sorted(twice.items()):
        shard, row, line = place(number)
        other, _, other_line = place(earlier)
        where = f"{records[other].path}:{first_lines[other] + other_line}"
        found.setdefault(shard, {})[row] = BadRow(
            path=records[shard].path, line=line, found=f"uid {show(uid)} is already that of {where}",
            expected=_UNIQUE, flag="",
        )  # fmt: skip
    return found


def _without(directory: Path, index: int, record: ShardRecord, repeated: dict[int, dict[int, BadRow]]) -> ShardRecord:
    """Return the record of a shard after the rows with a repeated uid were taken out of it."""
    out = repeated.get(index)
    if not out:
        return record
    table = pa.Table.from_batches(list(_tables(directory, index)))
    stay = np.ones(record.kept, dtype=bool)
    stay[list(out)] = False
    path = arrow_path(directory, index)
    with replacing(path) as temporary:
        kept = table.filter(pa.array(stay)).combine_chunks()
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(kept, max_chunksize=BATCH_ROWS)
    details = sorted((*record.details, *out.values()), key=lambda row: row.line)
    changed = replace(
        record, kept=int(stay.sum()), faults=record.faults + len(out), details=tuple(details[:MAX_DETAILS]),
        num_bytes=path.stat().st_size,
    )  # fmt: skip
    write_record(directory, index, changed)
    return changed


# ---- digest and counts ----


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    responses: int
    cut: int
    answers: int
    digest: str


def _count(directory: Path, records: Sequence[ShardRecord], uids: Sequence[np.ndarray]) -> _Counts:
    state = hashlib.sha256()
    responses = cut = answers = 0
    for index in range(len(records)):
        start = 0
        for batch in _tables(directory, index):
            state.update(digest_bytes(uids[index][start : start + batch.num_rows], batch))
            start += batch.num_rows
            lengths = _lengths(batch["response"])
            responses += len(batch["response"]) - batch["response"].null_count
            cut += int((batch["response_len"].to_numpy() > lengths).sum())
            answers += len(batch["answer"]) - batch["answer"].null_count
    return _Counts(responses=responses, cut=cut, answers=answers, digest=state.hexdigest())


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def digest_bytes(uids: np.ndarray, batch: pa.RecordBatch) -> bytes:
    """Return the digest's input of some rows as little-endian int64.

    Of each row: uid, length of the prompt, length of the whole response (-1 without one), prompt ids, response ids.
    """
    prompt, response = batch["prompt"], batch["response"]
    prompt_len, response_len = _lengths(prompt), _lengths(response)
    sizes = 3 + prompt_len + response_len
    starts = np.cumsum(sizes) - sizes
    out = np.empty(int(sizes.sum()), dtype="<i8")
    out[starts], out[starts + 1] = uids, prompt_len
    is_null = pc.is_null(response).to_numpy(zero_copy_only=False)
    out[starts + 2] = np.where(is_null, -1, batch["response_len"].to_numpy())
    for lists, lengths, first in ((prompt, prompt_len, starts + 3), (response, response_len, starts + 3 + prompt_len)):
        within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        out[np.repeat(first, lengths) + within] = lists.flatten().to_numpy()
    return out.tobytes()
