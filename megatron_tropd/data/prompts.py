"""Reads prompt files into tokenized prompts, and gives them out in the order of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from megatron_tropd import rng
from megatron_tropd.data.encode import Fault, PromptFormat, encode_row
from megatron_tropd.data.rows import BadRow, PromptError, Row, read_rows
from megatron_tropd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BadRow", "CursorState", "PromptError", "PromptFormat", "PromptSet", "PromptSource", "load_prompts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """All usable prompts of the files, in file order."""

    prompts: tuple[Prompt, ...]
    skipped: tuple[BadRow, ...]
    """Rows left out by --on-bad-row skip."""
    digest: str
    """sha256 over uids, prompt ids and teacher response ids; answers and domains are not included."""


def load_prompts(
    paths: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    *,
    stop_ids: Sequence[int] | None = None,
) -> PromptSet:
    """Read and tokenize every row of ``paths`` (.jsonl or .parquet).

    A prompt's uid is its running row number over all files (bad rows count too, so skipping one
    changes no other uid), unless the row has an integer ``uid``.

    Args:
        paths: one file or several.
        tokenizer: turns text into ids.
        fmt: keys, limits and what to do with bad rows.
        stop_ids: the teacher's stop tokens (``eos_token_ids``); by default the tokenizer's eos.

    Raises:
        PromptError: bad rows (with ``on_bad_row="error"``), unusable files, or files without a usable row;
            all of them in one message.
        ValueError: no file, no stop token, or no chat template although ``fmt`` requires one.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    if not files:
        raise ValueError("no prompt files; expected at least one .jsonl or .parquet after --prompt-data")
    stops = _stop_ids(tokenizer, stop_ids)
    if fmt.chat_template and not tokenizer.chat_template:
        raise ValueError(
            f"--apply-chat-template: the tokenizer in {tokenizer.name_or_path!r} has no chat template; "
            "use a chat model's tokenizer or drop the flag"
        )
    prompts: list[Prompt] = []
    problems: list[BadRow] = []
    seen: dict[int, str] = {}
    row_number = 0
    for file in files:
        num_prompts, num_problems = len(prompts), len(problems)
        for row in read_rows(file, fmt.columns):
            result = row if isinstance(row, BadRow) else _encode(row, tokenizer, fmt, stops, row_number, seen)
            if isinstance(result, BadRow):
                problems.append(result)
            else:
                prompts.append(result)
            row_number += 1
        bad = problems[num_problems:]
        # An unusable file, or one with bad rows that are errors anyway, needs no second error.
        explained = any(not row.line for row in bad) or (bad and fmt.on_bad_row == "error")
        if len(prompts) == num_prompts and not explained:
            problems.append(_no_prompts(file, len(bad)))
    files_first = sorted(problems, key=lambda problem: problem.line > 0)
    if problems and (fmt.on_bad_row == "error" or not files_first[0].line):
        raise PromptError(files_first)
    return PromptSet(prompts=tuple(prompts), skipped=tuple(problems), digest=digest(prompts))


def _stop_ids(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
    given = [tokenizer.eos_token_id] if stop_ids is None else stop_ids
    stops = tuple(int(token) for token in given if token is not None)
    if not stops:
        raise ValueError(f"no stop token: the tokenizer in {tokenizer.name_or_path!r} has no eos and none was given")
    return stops


def _encode(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    stops: tuple[int, ...],
    row_number: int,
    seen: dict[int, str],
) -> Prompt | BadRow:
    """Return one row as a prompt, or as a BadRow.  The uid of a good row is entered in ``seen`` (uid -> place)."""
    try:
        prompt = encode_row(row, tokenizer, fmt, stops, row_number)
        if prompt.uid in seen:
            expected = "a uid of its own for every row (or no uid in any)"
            raise Fault(f"uid {prompt.uid} is already that of {seen[prompt.uid]}", expected)
    except Fault as fault:
        return BadRow(path=row.path, line=row.line, found=fault.found, expected=fault.expected, flag=fault.flag)
    seen[prompt.uid] = f"{row.path}:{row.line}"
    return prompt


def _no_prompts(path: str | Path, num_bad: int) -> BadRow:
    why = f" ({num_bad} bad rows)" if num_bad else ""
    expected = "at least one usable row"
    return BadRow(path=str(path), line=0, found=f"file has no prompts{why}", expected=expected, flag="--prompt-data")


def digest(prompts: Sequence[Prompt]) -> str:
    """Return the sha256 (hex) over uids, prompt ids and teacher response ids, in order."""
    state = hashlib.sha256()
    for prompt in prompts:
        response = prompt.teacher_response_ids
        header = (prompt.uid, len(prompt.token_ids), -1 if response is None else len(response))
        state.update(np.asarray((*header, *prompt.token_ids, *(response or ())), dtype="<i8").tobytes())
    return state.hexdigest()


class CursorState(TypedDict):
    """The state of a PromptSource in a checkpoint."""

    consumed: int
    digest: str


class PromptSource:
    """An endless sequence of prompts, epoch after epoch; its only state is ``consumed``, the number of prompts taken.

    Example:
        >>> source = PromptSource([Prompt(uid=7, token_ids=(1,))], seed=0)
        >>> [prompt.uid for prompt in source.take(2)], source.consumed
        ([7, 7], 2)
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        if not prompts:
            raise ValueError("a prompt source needs at least one prompt; see --prompt-data")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._digest = digest(self._prompts)
        self.consumed = 0

    @property
    def epoch(self) -> int:
        """Number of complete passes over the prompts."""
        return self.consumed // len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """Return the next ``n`` prompts.  They may cross the end of an epoch and so hold a prompt twice."""
        if n < 1:
            raise ValueError(f"take({n}): expected at least 1 prompt")
        size = len(self._prompts)
        taken = []
        for index in range(self.consumed, self.consumed + n):
            epoch, place = divmod(index, size)
            taken.append(self._prompts[_order(self._seed, epoch, size)[place] if self._shuffle else place])
        self.consumed += n
        return taken

    def state_dict(self) -> CursorState:
        """Return the number of prompts taken and the digest of the prompts."""
        return {"consumed": self.consumed, "digest": self._digest}

    def load_state_dict(self, state: CursorState) -> None:
        """Continue from the position at which ``state`` was taken.

        Raises:
            ValueError: the prompts are not those of the checkpoint, or its number of prompts taken is negative.
        """
        if state["digest"] != self._digest:
            raise ValueError(
                f"the prompts changed since the checkpoint (digest {state['digest'][:12]} then, {self._digest[:12]} "
                "now): restore the files, tokenizer and limits given by --prompt-data, --prompt-key, "
                "--response-key, --apply-chat-template, --max-prompt-length, --max-response-length and --on-bad-row, "
                "or start a new run (another --save directory) from the checkpoint's weights"
            )
        if state["consumed"] < 0:
            raise ValueError(f"prompt cursor {state['consumed']} in the checkpoint; expected 0 or more")
        self.consumed = state["consumed"]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    """Return the order of one epoch; the cache only saves time."""
    return tuple(rng.permutation(rng.key(seed, rng.Stream.SHUFFLE, epoch), size))
