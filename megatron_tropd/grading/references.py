"""Check, before a run, that a response can give the reference answers, and that what grades them is there."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

from megatron_tropd import sandbox
from megatron_tropd.flag_values import show
from megatron_tropd.grading.answers import braces_balance
from megatron_tropd.grading.choices import LETTERS
from megatron_tropd.grading.instructions import BadReference, needs_language, read_constraints
from megatron_tropd.grading.mathematics import MAX_LENGTH
from megatron_tropd.grading.programs import read_tests

Row = tuple[int, str, str]
"""(uid, answer, grader); the grader is "" where the row names none."""


def check_references(rows: Iterable[Row], default: str) -> list[str]:
    """Return what is wrong with reference answers, at most one error of each sort.

    Args:
        rows: those with an answer.
        default: the grader of rows that name none.
    """
    wrong: dict[str, list[int]] = {}
    for uid, answer, grader in rows:
        if fault := _fault(answer, grader or default):
            wrong.setdefault(fault, []).append(uid)
    return [f"{fault} ({len(uids)} rows, first: uid {uids[0]})" for fault, uids in wrong.items()]


def _fault(answer: object, kind: str) -> str:
    if kind not in _CHECKS:
        return f"a row names the grader {show(kind)}, expected one of {', '.join(_CHECKS)} (see --grader-key)"
    if not isinstance(answer, str):
        return f"a reference answer is a {type(answer).__name__}, expected text"
    if not answer.strip():
        return "a reference answer is blank, so that an empty answer would be right; give an answer or null"
    if answer == "nan":  # how Python writes the number that stands in an empty cell of a table
        return "a reference answer is 'nan', as an empty cell of a table is read; give an answer or null"
    try:
        return _CHECKS[kind](answer)
    except BadReference as error:
        return str(error)


def _math_fault(answer: str) -> str:
    if importlib.util.find_spec("math_verify") is None:
        return "--grader math needs math-verify, which is not installed: pip install math-verify, or use --grader exact"
    if len(answer) > MAX_LENGTH:
        return f"a reference answer has more than the {MAX_LENGTH} characters that --grader math compares"
    if not braces_balance(answer):
        return "a reference answer has braces that do not balance, which --grader math cannot read"
    return ""


def _choice_fault(answer: str) -> str:
    if len(answer.strip()) == 1 and answer.strip() in LETTERS:
        return ""
    return f"a reference answer is {show(answer)}, expected a capital letter from A to J for --grader choice"


def _instructions_fault(answer: str) -> str:
    if needs_language(read_constraints(answer)) and importlib.util.find_spec("langdetect") is None:
        return (
            "a constraint is about the language of the response, which needs the package langdetect: "
            "pip install 'megatron-tropd[instructions]'"
        )
    return ""


def _code_fault(answer: str) -> str:
    read_tests(answer)
    if problems := sandbox.check():
        return f"programs cannot be confined on this machine, so they are not run: {'; '.join(problems)}"
    return ""


_CHECKS: dict[str, Callable[[str], str]] = {
    "exact": lambda answer: "",
    "math": _math_fault,
    "choice": _choice_fault,
    "instructions": _instructions_fault,
    "code": _code_fault,
}
