"""What was read, what was left out and why, and what is left."""

from __future__ import annotations

import json
from collections import Counter
from typing import IO

from megatron_tropd.data.reading.rows import BadRow
from tools.prompt_preparation.drafts import REASONS

EXAMPLES = 5
"""Rows of each reason that the report names."""
MAX_DETAILS = 1000
"""Bad rows that are kept in detail; of more, only the number is known."""


class Tally:
    """Counts of one run.  ``dropped`` gets one JSON line for every row that is left out."""

    def __init__(self, dropped: IO[str] | None = None) -> None:
        self._dropped = dropped
        self.read = self.written = 0
        self.left_out: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {reason: [] for reason in REASONS}
        self.bad_rows: list[BadRow] = []
        self.stripped: Counter[str] = Counter()
        self.answers_left_out: Counter[str] = Counter()
        self.mapped_domains: set[str] = set()
        self.collisions: Counter[int] = Counter()
        """By the position of the question."""
        self.collision_examples: dict[int, list[str]] = {}
        self.domains: Counter[str] = Counter()
        self.graders: Counter[str] = Counter()
        self.available: Counter[str] = Counter()
        """Rows of each domain that --take and --max-rows choose from."""
        self.sums = {"prompt": 0, "response": 0}
        self.maxima = {"prompt": 0, "response": 0}
        self.num_responses = self.num_answers = 0

    def leave_out(self, reason: str, place: str, uid: str | None, detail: str = "") -> None:
        """Count a row that is not written; ``uid`` is None where the row gave no prompt."""
        self.left_out[reason] += 1
        _add_example(self.examples[reason], uid or place)
        if self._dropped is not None:
            line = {"uid": uid, "row": place, "reason": reason, "detail": detail}
            self._dropped.write(json.dumps(line, ensure_ascii=False) + "\n")

    def collide(self, number: int, uid: str) -> None:
        """Count a row that holds the question with this position."""
        self.collisions[number] += 1
        _add_example(self.collision_examples.setdefault(number, []), uid)

    def bad(self, row: BadRow) -> None:
        """Keep the report about a row that cannot be used."""
        if len(self.bad_rows) < MAX_DETAILS:
            self.bad_rows.append(row)

    def write(self, domain: str, grader: str | None, has_answer: bool, prompt: int, response: int | None) -> None:
        """Count a row that is written, with its lengths."""
        self.written += 1
        self.domains[domain] += 1
        self.num_answers += has_answer
        self.graders[grader or ""] += 1
        self.num_responses += response is not None
        for what, length in (("prompt", prompt), ("response", response or 0)):
            self.sums[what] += length
            self.maxima[what] = max(self.maxima[what], length)


def _add_example(examples: list[str], name: str) -> None:
    if len(examples) < EXAMPLES and name not in examples:
        examples.append(name)
