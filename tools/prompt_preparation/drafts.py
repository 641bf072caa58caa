"""A row on its way from a published data set to the project's own form, and why one is left out."""

from __future__ import annotations

from dataclasses import dataclass

GRADERS = ("math", "choice", "instructions", "code", "exact")
"""How an answer is graded; the column ``grader`` of a row."""

REASONS = {
    "bad_row": "cannot be used; --on-bad-row skip",
    "where": "another value than --where",
    "domain": "of a domain that --domains does not name",
    "tools": "the conversation uses tools",
    "no_answer": "without an answer; --require-answer",
    "duplicate": "a prompt that was kept before",
    "long_prompt": "longer than --max-prompt-length",
    "long_response": "longer than --max-response-length",
    "contaminated": "holds a question of --decontaminate",
    "conflict": "a prompt that comes with several answers; --conflicting-answers drop",
    "not_taken": "beyond --take",
    "over_max_rows": "beyond --max-rows",
}
"""Why a row is left out, in the order in which rows are judged."""

Message = dict[str, str]
"""One message of a conversation: its role and its content."""


class LeftOut(Exception):
    """A row that is good, but not wanted; ``reason`` is one of REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The answer of a row."""

    answer: str | None = None
    grader: str | None = None
    """One of GRADERS; None where there is no answer, or where the run's own grader is to decide."""
    left_out: str = ""
    """Why an answer that the row has cannot be written; "" if it can, or if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a layout reads from a row."""

    messages: tuple[Message, ...]
    """The prompt; the last message is not the assistant's."""
    is_text: bool = False
    """Whether the row has the prompt as a plain text, and not as messages."""
    response: str | None = None
    """The teacher's turn; None where there is none, or where it is not wanted."""
    reference: Reference = Reference()
    domain: str = ""
    uid: str | None = None
    """The row's own name in its data set."""
