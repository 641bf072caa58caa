"""The rows of the output: what is said of a response, whether it is kept, and Parquet files of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from megatron_tropd.data.encoding.encode import Encoder
from megatron_tropd.data.reading.rows import BadRow, Row
from megatron_tropd.generation.journal import Written
from megatron_tropd.generation.prompts import SourcePrompt
from megatron_tropd.grading.grader import Grader, Question

Keep = Literal["all", "finished", "right"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRow:
    """One row of the output.  ``prompt``, ``answer``, ``grader``, ``domain`` and ``tools`` are those of the data."""

    uid: str
    """PROMPT_UID/SAMPLE, which no other row has."""
    prompt_uid: str
    sample: int
    prompt: str
    response: str
    """Text without special tokens."""
    answer: str | None
    grader: str | None
    domain: str
    tools: str | None
    finish: str
    """"stop", or "length" where the response was cut."""
    right: bool | None
    """Whether it gives the answer; None where it was not graded."""
    response_ids: tuple[int, ...]
    """Tokens as they were written, with the stop token."""
    num_tokens: int
    model: str
    fault: str | None
    """Why no run could read the row, such as text without a character; None: one can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Counts of responses, and of their tokens."""

    responses: int = 0
    tokens: int = 0
    finished: int = 0
    graded: int = 0
    right: int = 0
    unreadable: int = 0
    kept: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMaker:
    """Makes the rows of the output."""

    encoder: Encoder
    """As a run with the same flags would read the rows."""
    model: str
    """What the rows say of who wrote them."""
    keep: Keep
    grader: Grader | None
    """Grades responses to prompts that have an answer; None: nothing is graded."""

    def rows(self, responses: Sequence[tuple[SourcePrompt, Written]]) -> list[ResponseRow]:
        """Return the rows of responses, in their order.

        Raises:
            GradingError: one cannot be graded.
        """
        rows = self._with_faults([self._row(prompt, written) for prompt, written in responses])
        if self.grader is None:
            return rows
        graded = [index for index, row in enumerate(rows) if row.answer is not None]
        for index, right in zip(graded, self.grader.all_right([_question(rows[i]) for i in graded]), strict=True):
            rows[index] = replace(rows[index], right=right)
        return rows

    def _row(self, prompt: SourcePrompt, written: Written) -> ResponseRow:
        """Return the row of one response, not graded."""
        return ResponseRow(
            uid=f"{prompt.uid}/{written.sample}", prompt_uid=prompt.uid, sample=written.sample, prompt=prompt.prompt,
            response=str(self.encoder.tokenizer.decode(list(written.token_ids), skip_special_tokens=True)),
            answer=prompt.answer, grader=prompt.grader or None, domain=prompt.domain, tools=prompt.tools,
            finish=written.finish, right=None, response_ids=written.token_ids, num_tokens=len(written.token_ids),
            model=self.model, fault=None,
        )  # fmt: skip

    def _with_faults(self, rows: Sequence[ResponseRow]) -> list[ResponseRow]:
        """Return the rows with what a run would say of them."""
        given = [Row(path="", line=0, value=_as_read(row), keys=()) for row in rows]
        return [
            replace(row, fault=read.found) if isinstance(read, BadRow) else row
            for row, read in zip(rows, self.encoder.encode(given), strict=True)
        ]

    def keeps(self, row: ResponseRow) -> bool:
        """Return whether the row goes into the data.  One that no run could read never does."""
        wanted = {"all": True, "finished": row.finish == "stop", "right": row.right is True}[self.keep]
        return wanted and row.fault is None

    def counts(self, rows: Sequence[ResponseRow]) -> Counts:
        """Return the counts of rows."""
        return Counts(
            responses=len(rows),
            tokens=sum(row.num_tokens for row in rows),
            finished=sum(row.finish == "stop" for row in rows),
            graded=sum(row.right is not None for row in rows),
            right=sum(row.right is True for row in rows),
            unreadable=sum(row.fault is not None for row in rows),
            kept=sum(map(self.keeps, rows)),
        )


def _as_read(row: ResponseRow) -> dict[str, object]:
    """Return what a run reads of a row."""
    return {
        "uid": row.uid, "prompt": row.prompt, "response": row.response, "answer": row.answer, "grader": row.grader,
        "domain": row.domain, "tools": row.tools,
    }  # fmt: skip


def _question(row: ResponseRow) -> Question:
    assert row.answer is not None
    return Question(response=row.response, finished=row.finish == "stop", reference=row.answer, grader=row.grader or "")


def write_parquet(path: Path, rows: Sequence[ResponseRow]) -> None:
    """Write rows as one Parquet file; equal rows give equal bytes.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    types = {"sample": pyarrow.int32(), "num_tokens": pyarrow.int32(), "right": pyarrow.bool_()}
    types["response_ids"] = pyarrow.list_(pyarrow.int32())
    names = [field.name for field in fields(ResponseRow)]
    schema = pyarrow.schema([(name, types.get(name, pyarrow.string())) for name in names])
    columns = [pyarrow.array([getattr(row, name) for row in rows], type=schema.field(name).type) for name in names]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, schema=schema), path, compression="zstd")
