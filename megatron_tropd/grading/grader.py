"""Compare the answer of a response with the reference answer."""

from __future__ import annotations

import importlib.util
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from megatron_tropd.flag_values import show
from megatron_tropd.grading.answers import Answer, braces_balance, find_answer, normalized
from megatron_tropd.grading.math_process import MathProcess

GraderKind = Literal["exact", "math"]
MAX_MATH_LENGTH = 1000
"""Characters; a longer answer is compared as text only, because the time of a parser is more than linear in it."""

_REMEMBERED = 4096
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\{([^{}\\]*)\}")
_WORDS = re.compile(r"[^\W\d_]{4,}|[^\W\d_]+(?:[ -][^\W\d_]+)+")
"""A word of more than three letters, or several words.  math-verify reads it as a product of letters: east = eats."""
_SEVERAL_NUMBERS = re.compile(r"[-+]?[\d.,]+(?: [-+]?[\d.,]+)+")
"""math-verify reads ``1 2`` as the mixed number 1 + 2, which is ``2 1`` too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """Finds the answer of a response and compares it with the reference."""

    kind: GraderKind
    pattern: re.Pattern[str] | None
    """Its last match counts, and group 1 is the answer; None for the last ``\\boxed{...}``."""
    equal: Callable[[str, str], bool]
    """(answer, reference) -> whether they are equal; both have single spaces, and none at the ends."""

    def answer(self, response: str) -> Answer | None:
        """Return the last answer in ``response``, or None if there is none."""
        return find_answer(response, self.pattern)

    def right(self, response: str, finished: bool, reference: str) -> bool:
        """Return whether a response that ended with a stop token gives the answer ``reference``.

        A truncated response is wrong even if it contains the answer, because the student did not finish.
        """
        if not finished or (answer := self.answer(response)) is None:
            return False
        return self.equal(answer.text, normalized(reference))


def make_grader(kind: GraderKind, answer_pattern: str) -> Grader:
    """Make the grader of --grader and --answer-pattern, where "" is the last ``\\boxed{...}``.

    A grader of mathematics starts a process when it first needs one.

    Raises:
        ValueError: the pattern cannot be used, or the package of --grader math is not installed.
    """
    pattern = None
    if answer_pattern:
        try:
            pattern = re.compile(answer_pattern)
        except (re.error, OverflowError, RecursionError) as error:  # a{99999999999} overflows, "(" * 9999 recurses
            raise ValueError(f"--answer-pattern {show(answer_pattern)} is not a regular expression: {error}") from None
        if pattern.groups < 1:
            raise ValueError(
                f"--answer-pattern {show(answer_pattern)} has no group; put the answer in parentheses, as in '= *(.+)$'"
            )
    if kind == "exact":
        return Grader(kind=kind, pattern=pattern, equal=operator.eq)
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "--grader math needs the package math-verify, which is not installed: "
            "pip install 'megatron-tropd[math]', or use --grader exact"
        )
    return Grader(kind=kind, pattern=pattern, equal=math_equality())


def math_equality() -> Callable[[str, str], bool]:
    """Return a function that tells whether an answer and its reference are equal as text or as mathematics.

    The samples of a prompt often give the same answer, so the last few thousand verdicts are remembered.
    """
    process = MathProcess()

    @lru_cache(maxsize=_REMEMBERED)
    def equal(answer: str, reference: str) -> bool:
        answer, reference = _plain(answer), _plain(reference)
        if answer == reference or not answer:
            return answer == reference
        if any(_WORDS.fullmatch(text) for text in (answer, reference)):
            return answer.casefold() == reference.casefold()
        if any(_SEVERAL_NUMBERS.fullmatch(text) or len(text) > MAX_MATH_LENGTH for text in (answer, reference)):
            return False
        return process.equal(answer, reference)

    return equal


def _plain(text: str) -> str:
    """Return ``text`` without dollar signs around it, ``\\text{...}`` around all of it and a full stop at its end."""
    text = text.strip("$ ")
    if wrapped := _WRAPPED.fullmatch(text):
        text = wrapped.group(1)
    return normalized(text.removesuffix("."))


def check_references(answers: Iterable[tuple[int, str]], kind: GraderKind) -> list[str]:
    """Return what is wrong with reference answers, at most one error of each sort; ``answers`` are (uid, answer)."""
    wrong: dict[str, list[int]] = {}
    for uid, answer in answers:
        if fault := _fault(answer, kind):
            wrong.setdefault(fault, []).append(uid)
    return [f"{fault} ({len(uids)} rows, first: uid {uids[0]})" for fault, uids in wrong.items()]


def _fault(answer: object, kind: GraderKind) -> str:
    if not isinstance(answer, str):
        return f"a reference answer is a {type(answer).__name__}, expected text"
    if not answer.strip():
        return "a reference answer is blank, so that an empty answer would be right; give an answer or null"
    if answer == "nan":  # how Python writes the number that stands in an empty cell of a table
        return "a reference answer is 'nan', as an empty cell of a table is read; give an answer or null"
    if kind == "math" and len(answer) > MAX_MATH_LENGTH:
        return f"a reference answer has more than the {MAX_MATH_LENGTH} characters that --grader math compares"
    if kind == "math" and not braces_balance(answer):
        return "a reference answer has braces that do not balance, which --grader math cannot read"
    return ""
