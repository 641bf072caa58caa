"""The prompts of the data, in the order of its files: each with what the data says of it, and its tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_tropd.data.encoding.conversation import read_conversation
from megatron_tropd.data.encoding.encode import EncodedRow, Encoder
from megatron_tropd.data.encoding.fields import MISSING, lookup
from megatron_tropd.data.encoding.row_format import PromptFormat
from megatron_tropd.data.reading.readers import read_span
from megatron_tropd.data.reading.rows import BadRow, PromptError, Row
from megatron_tropd.data.reading.sources import DataFile
from megatron_tropd.data.reading.spans import Span

_BATCH = 256
_MAX_DETAILS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePrompt:
    """One usable row of the data."""

    number: int
    """Its place among the usable rows, from 0."""
    random_uid: int
    """The integer that decides its random numbers: the row's integer uid, or the number of the row over all files."""
    uid: str
    """The row's uid as text, or that number."""
    prompt: str
    """As the data has it: a text, or a JSON text of messages."""
    tools: str | None
    """JSON text of the tools for the chat template; None for none."""
    token_ids: tuple[int, ...]
    answer: str | None
    grader: str
    """Which the row names; "" for none."""
    domain: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one look at all of the data finds."""

    num_prompts: int
    longest: int
    """Tokens of the longest prompt."""
    bad_rows: int
    without_answer: int


def iterate(files: Sequence[DataFile], encoder: Encoder) -> Iterator[SourcePrompt | BadRow]:
    """Yield every row of the files, as a prompt or as the report of why it cannot be used.

    Responses that the data has are not read: ``encoder.fmt.response_key`` is "".
    """
    number = row_number = 0
    waiting: list[Row] = []
    names, numbers = set[str](), set[int]()
    for item in _rows(files, encoder.fmt):
        if isinstance(item, Row):
            waiting.append(item)
            if len(waiting) < _BATCH:
                continue
        rows, waiting = waiting, []
        for row, encoded in zip(rows, encoder.encode(rows), strict=True):
            if isinstance(encoded, EncodedRow):
                prompt = _prompt(row, encoded, encoder.fmt, number=number, row_number=row_number)
                if prompt.uid in names or prompt.random_uid in numbers:
                    yield _second(row, prompt)
                else:
                    names.add(prompt.uid)
                    numbers.add(prompt.random_uid)
                    yield prompt
                    number += 1
            elif encoded is not None:
                yield encoded
            row_number += 1
        if isinstance(item, BadRow):
            yield item
            row_number += item.line != 0


def _rows(files: Sequence[DataFile], fmt: PromptFormat) -> Iterator[Row | BadRow | None]:
    """Yield the rows of all files, and None where they end."""
    for file in files:
        yield from read_span(Span(file=file), fmt.columns)
    yield None


def _second(row: Row, prompt: SourcePrompt) -> BadRow:
    named = prompt.uid if prompt.uid == str(prompt.random_uid) else f"{prompt.uid} (row {prompt.random_uid})"
    return BadRow(
        path=row.path, line=row.line, found=f"uid {named} for the second time",
        expected="every uid once; a row without one has the number of its row", flag="--uid-key",
    )  # fmt: skip


def _prompt(row: Row, encoded: EncodedRow, fmt: PromptFormat, *, number: int, row_number: int) -> SourcePrompt:
    given, tools = lookup(row, fmt.prompt_key), lookup(row, fmt.tools_key)
    if fmt.chat_template:
        messages = read_conversation(given).messages
        plain = isinstance(given, str) and len(messages) == 1 and messages[0]["content"] == given
        given = given if plain else json.dumps(messages, ensure_ascii=False)
    has_tools = tools is not MISSING and bool(tools)
    return SourcePrompt(
        number=number,
        random_uid=encoded.uid if isinstance(encoded.uid, int) else row_number,
        uid=str(row_number if encoded.uid is None else encoded.uid),
        prompt=str(given),
        tools=(tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)) if has_tools else None,
        token_ids=tuple(encoded.prompt_ids.tolist()),
        answer=encoded.answer,
        grader=encoded.grader,
        domain=encoded.domain,
    )


def survey(files: Sequence[DataFile], encoder: Encoder) -> Survey:
    """Read all of the data once, before anything is written.

    Raises:
        PromptError: there are bad rows (with ``on_bad_row="error"``), unreadable files, or no usable row.
    """
    num_prompts = longest = bad = without_answer = 0
    details: list[BadRow] = []
    for item in iterate(files, encoder):
        if isinstance(item, BadRow):
            bad += 1
            if len(details) < _MAX_DETAILS or not item.line:
                details.append(item)
            continue
        num_prompts += 1
        longest = max(longest, len(item.token_ids))
        without_answer += item.answer is None
    unreadable = [row for row in details if not row.line]
    if unreadable or (bad and encoder.fmt.on_bad_row == "error"):
        raise PromptError(details, bad)
    if not num_prompts:
        raise PromptError([_nothing(files, bad)])
    return Survey(num_prompts=num_prompts, longest=longest, bad_rows=bad, without_answer=without_answer)


def _nothing(files: Sequence[DataFile], bad: int) -> BadRow:
    found = f"no usable row in {len(files)} file(s)" + (f" ({bad} bad rows)" if bad else "")
    return BadRow(path=files[0].path, line=0, found=found, expected="at least one prompt", flag="--prompt-data")
