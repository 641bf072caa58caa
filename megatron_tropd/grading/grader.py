"""Tell whether responses are right."""

from __future__ import annotations

import hashlib
import re
import textwrap
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import cast

from megatron_tropd.flag_values import show
from megatron_tropd.grading import mathematics
from megatron_tropd.grading.answers import Answer, after_thinking, last_box, normalized
from megatron_tropd.grading.choices import find_choice
from megatron_tropd.grading.programs import find_program, passes, read_tests
from megatron_tropd.grading.workers import GradingError, Workers, share_of_cores
from megatron_tropd.sandbox import SandboxError
from megatron_tropd.types import GraderKind

_REMEMBERED = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A response to be graded."""

    response: str
    finished: bool
    """Whether it ended with a stop token."""
    reference: str
    grader: str = ""
    """Which the row names; "" for the default."""


class _Verdicts:
    """The last verdicts: the samples of a prompt often give the same answer.  Threads may use it at one time."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, bool] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, parts: Sequence[str], judge: Callable[[], bool]) -> bool:
        """Return the verdict on ``parts``, which ``judge`` gives the first time."""
        state = hashlib.sha256()
        for part in parts:
            data = part.encode("utf-8", errors="surrogatepass")
            state.update(b"%d:" % len(data) + data)
        key = state.digest()
        with self._lock:
            if key in self._known:
                return self._known[key]
        verdict = judge()
        with self._lock:
            self._known[key] = verdict
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """Finds the answer of a response and compares it with the reference."""

    kind: GraderKind
    pattern: str
    """Of ``exact`` and ``math``: its last match counts, and group 1 is the answer; "" for the last ``\\boxed{...}``."""
    lenient: bool
    workers: Workers
    verdicts: _Verdicts

    def of_row(self, name: str) -> Grader:
        """Return the grader of a row that names ``name``, a GraderKind; itself for ""."""
        return replace(self, kind=cast(GraderKind, name)) if name else self

    def answer(self, response: str) -> Answer | None:
        """Return the last answer in what ``response`` says after its thoughts, or None if there is none.

        Of ``exact`` and ``math`` each run of whitespace is one space; of ``choice`` it is the letter, of ``code`` the
        program, and of ``instructions`` all that is said.

        Raises:
            GradingError: a worker failed.
        """
        said = after_thinking(response)
        if said is None or self.kind == "instructions":
            return said
        if self.kind == "choice":
            choice = find_choice(said.text, lenient=self.lenient)
            return None if choice is None else Answer(text=choice[0], start=said.start + choice[1])
        if self.kind == "code":
            place = find_program(said.text)
        elif self.pattern:
            place = self.workers.ask("find", said.text, self.pattern)
        else:
            place = last_box(said.text)
        if place is None:
            return None
        text = said.text[place[0] : place[1]]
        return Answer(
            text=textwrap.dedent(text) if self.kind == "code" else normalized(text), start=said.start + place[0]
        )

    def right(self, response: str, finished: bool, reference: str) -> bool:
        """Return whether a response that ended with a stop token gives the answer ``reference``.

        A truncated response is wrong even if it contains the answer, because the student did not finish.

        Raises:
            GradingError: a worker failed, or the sandbox cannot confine a program.
        """
        if not finished or (answer := self.answer(response)) is None:
            return False
        if self.kind == "exact":
            return answer.text == normalized(reference)
        if self.kind == "choice":
            return answer.text == reference.strip()
        judge = {"math": self._equal, "instructions": self._follows, "code": self._passes}[self.kind]
        parts = (self.kind, str(self.lenient), answer.text, reference)
        return self.verdicts.get(parts, lambda: judge(answer.text, reference))

    def all_right(self, questions: Sequence[Question]) -> list[bool]:
        """Return for each question whether its response is right.  All workers are at work at one time.

        Raises:
            GradingError: a worker failed, or the sandbox cannot confine a program.
        """
        with ThreadPoolExecutor(self.workers.size) as threads:
            verdicts = [threads.submit(self._judge, question) for question in questions]
            try:
                return [verdict.result() for verdict in verdicts]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _judge(self, question: Question) -> bool:
        return self.of_row(question.grader).right(question.response, question.finished, question.reference)

    def _equal(self, answer: str, reference: str) -> bool:
        def ask(one: str, other: str) -> bool:
            return bool(self.workers.ask("equal", one, other))

        return mathematics.equal(answer, normalized(reference), ask)

    def _follows(self, text: str, reference: str) -> bool:
        return bool(self.workers.ask("follow", text, reference, self.lenient))

    def _passes(self, program: str, reference: str) -> bool:
        try:
            return passes(program, read_tests(reference))
        except SandboxError as error:
            raise GradingError(f"a program was not run: {error}") from error


def make_grader(kind: GraderKind, answer_pattern: str = "", *, lenient: bool = False) -> Grader:
    """Make the grader of --grader, --answer-pattern ("" is the last ``\\boxed{...}``) and --lenient-grading.

    Processes start when they are first needed.

    Raises:
        ValueError: the pattern cannot be used.
    """
    if answer_pattern:
        try:
            pattern = re.compile(answer_pattern)
        except (re.error, OverflowError, RecursionError) as error:  # a{99999999999} overflows, "(" * 9999 recurses
            raise ValueError(f"--answer-pattern {show(answer_pattern)} is not a regular expression: {error}") from None
        if pattern.groups < 1:
            raise ValueError(
                f"--answer-pattern {show(answer_pattern)} has no group; put the answer in parentheses, as in '= *(.+)$'"
            )
    return Grader(
        kind=kind, pattern=answer_pattern, lenient=lenient, workers=Workers(share_of_cores()), verdicts=_Verdicts()
    )
