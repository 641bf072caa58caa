"""Responses of a shard that is not whole yet: one JSON line each, on disk before they count as written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.atomic_files import writing
from megatron_tropd.types import Finish


class DamagedJournal(ValueError):
    """A line that was written whole is not a response."""

    exit_code = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One response."""

    number: int
    """Of its prompt (:class:`SourcePrompt`)."""
    sample: int
    token_ids: tuple[int, ...]
    """Of the response, with the stop token that ended it."""
    finish: Finish
    """"stop", or "length" where it was cut."""

    def line(self) -> str:
        """Return its line in the journal."""
        named = {"number": self.number, "sample": self.sample, "token_ids": self.token_ids, "finish": self.finish}
        return json.dumps(named) + "\n"

    @property
    def key(self) -> tuple[int, int]:
        """Prompt and sample, which name a response."""
        return self.number, self.sample


class Journal:
    """The file of one shard.  What a kill leaves of a line at the end is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = _whole_lines(path)
        """Bytes of whole lines."""

    def read(self) -> Iterator[Written]:
        """Yield the responses of all whole lines.

        Raises:
            DamagedJournal: a line is something else; only a change of the file makes that.
        """
        if not self.size:
            return
        with self._path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                    yield Written(**{**value, "token_ids": tuple(value["token_ids"])})
                except (ValueError, TypeError, KeyError) as error:
                    raise DamagedJournal(
                        f"{self._path}:{number} is not a response that was written here ({error}); delete the file, "
                        "and its responses are written again"
                    ) from None

    def append(self, responses: Sequence[Written]) -> None:
        """Add responses; they are on disk when this returns, or none of them is.

        Raises:
            OSError: they cannot be written.
        """
        data = "".join(response.line() for response in responses).encode()
        with writing(self._path):
            try:
                with self._path.open("ab") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                if self._path.exists():
                    os.truncate(self._path, self.size)
                raise
        self.size += len(data)


def _whole_lines(path: Path) -> int:
    """Cut off what stands behind the last newline, and return how many bytes are left."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            if (at := file.read(end - start).rfind(b"\n")) >= 0:
                end = start + at + 1
                break
            end = start
        file.truncate(end)
    return end
