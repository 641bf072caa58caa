"""The responses on disk, in shards of so many prompts each: a journal while one is written, then Parquet.

SAVE/generation.json        what decides the responses
SAVE/journal/00003.jsonl    responses of a shard that is not whole yet
SAVE/data/00002.parquet     what is kept of a whole shard
SAVE/dropped/00002.parquet  what is not
SAVE/shards/00002.json      its counts; written last, so that a shard with this file is whole
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_tropd.atomic_files import remove_unfinished, replacing
from megatron_tropd.generation.journal import Journal, Written
from megatron_tropd.generation.prompts import SourcePrompt
from megatron_tropd.generation.rows import Counts, ResponseRow, RowMaker, write_parquet
from megatron_tropd.json_files import as_dataclass, read_json_object

FOLDERS = ("journal", "data", "dropped", "shards")


class ResponseStore:
    """The responses of one output directory.

    Prompts are announced in order (:meth:`missing`); their responses arrive in any order (:meth:`add`).  Memory holds
    the prompts of the shards that are being written, and of their responses the names only.

    Raises:
        OSError: the directory cannot be written.
        DamagedJournal: a journal of an earlier launch was changed.
    """

    def __init__(self, directory: Path, maker: RowMaker, *, num_prompts: int, samples: int, shard_size: int) -> None:
        self._directory, self._maker = directory, maker
        self._num_prompts, self._samples, self._shard_size = num_prompts, samples, shard_size
        self._shards: dict[int, _OpenShard] = {}
        for name in FOLDERS:
            (directory / name).mkdir(parents=True, exist_ok=True)
            remove_unfinished(directory / name)
        self._whole: dict[int, Counts] = {}
        for shard in range(self.num_shards):
            if (path := self._record(shard)).exists():
                self._whole[shard] = as_dataclass(Counts, read_json_object(path, strict=True), str(path))
                self._journal(shard).unlink(missing_ok=True)  # a kill between the two left it
            elif self._journal(shard).exists():
                self._open(shard)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self._num_prompts // self._shard_size)

    @property
    def counts(self) -> Counts:
        """Counts over the whole shards."""
        return sum(self._whole.values(), Counts())

    @property
    def num_stored(self) -> int:
        """Responses on disk, in whole shards and in journals."""
        return self.counts.responses + sum(len(shard.stored) for shard in self._shards.values())

    def missing(self, prompt: SourcePrompt) -> tuple[int, ...]:
        """Return the samples of the next prompt that have to be written."""
        shard = prompt.number // self._shard_size
        if shard in self._whole:
            return ()
        opened = self._open(shard)
        opened.prompts[prompt.number] = prompt
        missing = tuple(i for i in range(self._samples) if (prompt.number, i) not in opened.stored)
        if not missing:
            self._finish_if_whole(shard)
        return missing

    def add(self, responses: Sequence[Written]) -> None:
        """Put responses on disk, and make Parquet of the shards that are whole with them.

        Raises:
            OSError: they cannot be written; those of earlier calls are safe.
            GradingError: a response cannot be graded.
        """
        by_shard: dict[int, list[Written]] = {}
        for response in responses:
            by_shard.setdefault(response.number // self._shard_size, []).append(response)
        for shard, some in by_shard.items():
            opened = self._open(shard)
            opened.journal.append(some)
            opened.stored.update(response.key for response in some)
            self._finish_if_whole(shard)

    def _open(self, shard: int) -> _OpenShard:
        if shard not in self._shards:
            self._shards[shard] = _OpenShard(Journal(self._journal(shard)))
        return self._shards[shard]

    def _finish_if_whole(self, shard: int) -> None:
        opened = self._shards[shard]
        size = min(self._shard_size, self._num_prompts - shard * self._shard_size)
        if len(opened.prompts) < size or len(opened.stored) < size * self._samples:
            return
        responses = sorted({response.key: response for response in opened.journal.read()}.values(), key=_key)
        rows = self._maker.rows([(opened.prompts[response.number], response) for response in responses])
        self._write(shard, "data", [row for row in rows if self._maker.keeps(row)])
        self._write(shard, "dropped", [row for row in rows if not self._maker.keeps(row)])
        counts = self._maker.counts(rows)
        with replacing(self._record(shard)) as path:
            path.write_text(json.dumps(asdict(counts)) + "\n", encoding="utf-8")
        self._whole[shard] = counts
        del self._shards[shard]
        self._journal(shard).unlink(missing_ok=True)

    def _write(self, shard: int, folder: str, rows: Sequence[ResponseRow]) -> None:
        """Write one file of a shard; none where there are no rows, because a file without rows is no data."""
        path = self._directory / folder / f"{shard:05d}.parquet"
        if rows:
            with replacing(path) as temporary:
                write_parquet(temporary, rows)

    def _record(self, shard: int) -> Path:
        return self._directory / "shards" / f"{shard:05d}.json"

    def _journal(self, shard: int) -> Path:
        return self._directory / "journal" / f"{shard:05d}.jsonl"


class _OpenShard:
    """A shard that is being written."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.stored = {response.key for response in journal.read()}
        self.prompts: dict[int, SourcePrompt] = {}


def _key(response: Written) -> tuple[int, int]:
    return response.key
