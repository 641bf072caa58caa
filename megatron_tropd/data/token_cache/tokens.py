"""The rows of a finished token cache, mapped into memory: what is not read costs no memory."""

from __future__ import annotations

import bisect
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_tropd.data.token_cache.shard import BATCH_ROWS, arrow_path
from megatron_tropd.types import Prompt


class TokenRows:
    """The prompts of a cache, by their number in the order of the files.

    Args:
        directory: of the cache.
        kept: usable rows of each shard.
        uids: uid of every row; may be mapped into memory.
    """

    def __init__(self, directory: Path, kept: Sequence[int], uids: np.ndarray) -> None:
        self._directory, self._uids = directory, uids
        self._starts = [0, *itertools.accumulate(kept)]
        self._reader = lru_cache(maxsize=None)(self._open)

    def __len__(self) -> int:
        return self._starts[-1]

    def _open(self, shard: int) -> pa.ipc.RecordBatchFileReader:
        return pa.ipc.open_file(pa.memory_map(str(arrow_path(self._directory, shard))))

    def answers(self) -> Iterator[tuple[int, str, str]]:
        """Yield (uid, answer, grader) of the prompts that have an answer."""
        for shard, start in enumerate(self._starts[:-1]):
            reader = self._reader(shard)
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                answers, graders = batch["answer"].to_pylist(), batch["grader"].to_pylist()
                uids = self._uids[start : start + len(answers)].tolist()
                yield from (row for row in zip(uids, answers, graders, strict=True) if row[1] is not None)
                start += len(answers)

    def domains(self) -> Counter[str]:
        """Return the number of prompts by domain."""
        found: Counter[str] = Counter()
        for shard in range(len(self._starts) - 1):
            reader = self._reader(shard)
            for number in range(reader.num_record_batches):
                for entry in reader.get_batch(number)["domain"].value_counts().to_pylist():
                    found[entry["values"]] += entry["counts"]
        return found

    def prompt(self, number: int) -> Prompt:
        """Return one prompt.

        Raises:
            IndexError: ``number`` is not in 0 .. len - 1.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"prompt {number} of {len(self)}")
        shard = bisect.bisect_right(self._starts, number) - 1
        batch, row = divmod(number - self._starts[shard], BATCH_ROWS)
        columns = self._reader(shard).get_batch(batch).slice(row, 1).to_pylist()[0]
        response = columns["response"]
        return Prompt(
            uid=int(self._uids[number]),
            name=columns["name"] or "",
            token_ids=tuple(columns["prompt"]),
            teacher_response_ids=None if response is None else tuple(response),
            teacher_response_len=None if response is None else columns["response_len"],
            answer=columns["answer"],
            grader=columns["grader"],
            domain=columns["domain"],
        )
