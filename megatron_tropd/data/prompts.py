"""The prompts of a run: rows of the data as tokens, mapped into memory from a cache on disk.

--prompt-data  ->  reading/  files, spans, rows  ->  encoding/  texts, tokens  ->  token_cache/  ->  PromptSet
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from megatron_tropd.data.encoding.encode import Encoder
from megatron_tropd.data.encoding.row_format import PromptFormat
from megatron_tropd.data.reading.rows import BadRow, PromptError
from megatron_tropd.data.reading.sources import Source, SourceError, find_source
from megatron_tropd.data.token_cache.build import default_root, open_cache
from megatron_tropd.data.token_cache.finish import Summary
from megatron_tropd.data.token_cache.tokens import TokenRows
from megatron_tropd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BadRow", "PromptError", "PromptFormat", "PromptSet", "digest", "load_prompts"]


class PromptSet(Sequence[Prompt]):
    """All usable prompts of the data, in the order of the files.  Only what is looked at is in memory."""

    def __init__(self, directory: Path, summary: Summary, sources: Sequence[Source]) -> None:
        uids = np.load(directory / "uids.npy", mmap_mode="r")
        self.summary, self.sources = summary, tuple(sources)
        self.directory = directory
        self._rows = TokenRows(directory, summary.kept, uids)
        order = None if summary.is_sorted else np.load(directory / "uid_order.npy", mmap_mode="r")
        self.by_uid: Mapping[int, Prompt] = _ByUid(self._rows, uids, order)

    @property
    def digest(self) -> str:
        """sha256 over uids, prompt ids and teacher response ids; answers, graders and domains are not included."""
        return self.summary.digest

    @property
    def skipped(self) -> tuple[BadRow, ...]:
        """The first rows left out by --on-bad-row skip; ``summary.num_faults`` is the number of all."""
        return self.summary.details

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self._rows.prompt(number) for number in range(*index.indices(len(self)))]
        return self._rows.prompt(index + len(self) if index < 0 else index)

    def answers(self) -> Iterator[tuple[int, str, str]]:
        """Yield (uid, answer, grader) of the prompts that have an answer; no tokens are read."""
        return self._rows.answers()

    def domains(self) -> Counter[str]:
        """Return the number of prompts by domain; no tokens are read."""
        return self._rows.domains()

    def __iter__(self) -> Iterator[Prompt]:
        return (self._rows.prompt(number) for number in range(len(self)))


class _ByUid(Mapping[int, Prompt]):
    """The prompts by uid, found by bisection."""

    def __init__(self, rows: TokenRows, uids: np.ndarray, order: np.ndarray | None) -> None:
        self._rows, self._uids, self._order = rows, uids, order

    def __getitem__(self, uid: int) -> Prompt:
        place = int(np.searchsorted(self._uids, uid, sorter=self._order))
        if place < len(self._uids):
            number = place if self._order is None else int(self._order[place])
            if self._uids[number] == uid:
                return self._rows.prompt(number)
        raise KeyError(uid)

    def __len__(self) -> int:
        return len(self._uids)

    def answers(self) -> Iterator[tuple[int, str, str]]:
        """Yield (uid, answer, grader) of the prompts that have an answer; no tokens are read."""
        return self._rows.answers()

    def __iter__(self) -> Iterator[int]:
        return (int(uid) for uid in self._uids)


def load_prompts(
    sources: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    *,
    stop_ids: Sequence[int] | None = None,
    cache_root: Path | None = None,
    flag: str = "--prompt-data",
    say: Callable[[str], None] = lambda text: None,
) -> PromptSet:
    """Read and tokenize every row of ``sources``, or map the tokens of an earlier call into memory.

    A prompt's uid is its running row number over all files (bad rows count too, so skipping one
    changes no other uid), unless the row has an integer uid.  A uid that is a text becomes the prompt's name.

    Args:
        sources: files, directories or data sets, as --prompt-data takes them.
        tokenizer: turns text into ids.
        fmt: keys, limits and what to do with bad rows.
        stop_ids: the teacher's stop tokens (``eos_token_ids``); by default the tokenizer's eos.
        cache_root: where tokens are kept; by default ``default_root()``.
        flag: the flag that gave ``sources``, for messages.
        say: called with a line about the progress of long work.

    Raises:
        PromptError: bad rows (with ``on_bad_row="error"``), unusable files, or files without a usable row;
            all of them in one message.
        CacheError: the tokens cannot be stored.
        ValueError: no file, no stop token, or no chat template although ``fmt`` requires one.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise ValueError(f"no prompt files; expected at least one file, directory or data set after {flag}")
    encoder = Encoder(tokenizer=tokenizer, fmt=fmt, stop_ids=_stop_ids(tokenizer, stop_ids))
    if fmt.chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"--apply-chat-template: the tokenizer in {tokenizer.name_or_path!r} has no chat template; "
            "use a chat model's tokenizer or drop the flag"
        )
    found, unusable = _find(given, flag)
    files = [file for source in found for file in source.files]
    directory, summary = open_cache(cache_root or default_root(), files, encoder, say)
    problems = [*unusable, *_file_problems(summary, [file.path for file in files], fmt, flag)]
    row_problems = [row for row in summary.details if row.line]
    if problems or (summary.num_faults and fmt.on_bad_row == "error"):
        about_files = sum(not row.line for row in summary.details)
        raise PromptError([*problems, *row_problems], len(problems) + summary.num_faults - about_files)
    return PromptSet(directory, summary, found)


def _find(given: Sequence[str | Path], flag: str) -> tuple[list[Source], list[BadRow]]:
    found, unusable = [], []
    for name in given:
        try:
            found.append(find_source(str(name), flag))
        except SourceError as error:
            unusable.append(BadRow(path=error.path, line=0, found=error.found, expected=error.expected, flag=flag))
    return found, unusable


def _stop_ids(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
    given = [tokenizer.eos_token_id] if stop_ids is None else stop_ids
    stops = tuple(int(token) for token in given if token is not None)
    if not stops:
        raise ValueError(f"no stop token: the tokenizer in {tokenizer.name_or_path!r} has no eos and none was given")
    return stops


def _file_problems(summary: Summary, paths: Sequence[str], fmt: PromptFormat, flag: str) -> list[BadRow]:
    """Return the files that cannot be read, and those without a usable row whose rows do not say why."""
    # The cache does not know by which flag this run names the files.
    problems = [replace(row, flag=row.flag and flag) for row in summary.details if not row.line]
    unreadable = {row.path for row in problems}
    for path in dict.fromkeys(paths):
        counts = summary.files[path]
        explained = path in unreadable or (counts.faults and fmt.on_bad_row == "error")
        if not counts.kept and not explained:
            problems.append(_no_prompts(path, counts.faults, counts.dropped, flag))
    return problems


def _no_prompts(path: str, num_bad: int, num_dropped: int, flag: str) -> BadRow:
    reasons = [f"{num_bad} bad rows"] * bool(num_bad) + [f"{num_dropped} with too long a response"] * bool(num_dropped)
    why = f" ({', '.join(reasons)})" if reasons else ""
    return BadRow(path=path, line=0, found=f"file has no prompts{why}", expected="at least one usable row", flag=flag)


def digest(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 (hex) over uids, prompt ids and teacher response ids, in order."""
    if isinstance(prompts, PromptSet):
        return prompts.digest
    state = hashlib.sha256()
    for prompt in prompts:
        response = prompt.teacher_response_ids
        header = (prompt.uid, len(prompt.token_ids), -1 if response is None else prompt.whole_response_len)
        state.update(np.asarray((*header, *prompt.token_ids, *(response or ())), dtype="<i8").tobytes())
    return state.hexdigest()
