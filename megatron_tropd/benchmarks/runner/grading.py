"""What a response gets, for each kind of question.  evalscope compares mathematics and checks instructions; this
project finds answers and letters, and runs programs in its sandbox."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tropd.benchmarks.code_tests import read_tests
from megatron_tropd.benchmarks.data_files import Row
from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.grading.answers import after_thinking, last_box
from megatron_tropd.grading.choices import find_choice
from megatron_tropd.grading.programs import find_program, passes
from megatron_tropd.sandbox import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """What one response got."""

    scores: dict[str, float]
    """Metric -> score, all metrics of the benchmark."""
    answer: str = ""
    """What was found in the response, for people."""
    error: str = ""
    """Why the response could not be graded; it then counts as wrong."""


def answer_text(response: str) -> str:
    """Return what follows the thinking; all of a response that does not think; nothing of one that never ends to."""
    said = after_thinking(response)
    return said.text if said else ""


def grade_math(name: str, row: Row, text: str) -> Grade:
    """Compare the last box with the reference; ``lenient`` also takes what evalscope finds outside of boxes."""
    from evalscope.metrics.math.contracts import MathEvaluationError
    from evalscope.metrics.math.parser import compare_answers, extract_answer

    integer = BENCHMARKS[name].integer_answers
    box = last_box(text)
    strict = text[slice(*box)].strip() if box else ""
    try:
        accuracy = _matches(compare_answers, strict, row["answer"], integer)
        lenient = accuracy or _matches(compare_answers, extract_answer(text), row["answer"], integer)
    except MathEvaluationError as error:  # math-verify took too long, or could not be asked
        return Grade(scores={"accuracy": 0.0, "lenient": 0.0}, answer=strict, error=str(error))
    return Grade(scores={"accuracy": accuracy, "lenient": lenient}, answer=strict)


def _matches(compare: Any, answer: str, reference: str, integer: bool) -> float:
    return float(bool(answer) and compare(answer, reference, integer_only=integer).matched)


def grade_choice(targets: list[str], text: str) -> Grade:
    """Compare the letter that is stated, and the last one that stands alone, with the letters that are right."""
    found = {metric: find_choice(text, lenient=metric == "lenient") for metric in ("accuracy", "lenient")}
    letters = {metric: choice[0] if choice else "" for metric, choice in found.items()}
    return Grade(
        scores={metric: float(letter in targets) for metric, letter in letters.items()}, answer=letters["accuracy"]
    )


def grade_instructions(row: Row, text: str) -> Grade:
    """Check the instructions of IFBench by evalscope's copies of its checks."""
    from evalscope.benchmarks.ifbench.evaluation_lib import process_results

    document = {
        "key": row.get("key", 0), "prompt": row["prompt"], "instruction_id_list": row["instruction_id_list"],
        "kwargs": [{key: value for key, value in given.items() if value is not None} for given in row["kwargs"]],
    }  # fmt: skip
    names = {
        "prompt_strict": "prompt_level_strict", "prompt_loose": "prompt_level_loose",
        "instruction_strict": "inst_level_strict", "instruction_loose": "inst_level_loose",
    }  # fmt: skip
    try:
        found: Mapping[str, float] = process_results(document, [text])
    except Exception as error:  # a check of IFBench that cannot read this response; its errors have no common base
        return Grade(scores=dict.fromkeys(names, 0.0), error=f"{type(error).__name__}: {error}")
    return Grade(scores={ours: float(found[theirs]) for ours, theirs in names.items()})


class CodeGrader:
    """Runs programs in the sandbox, a few at a time: more than the machine has cores would only wait for each other.

    Args:
        at_once: programs that run at one time.
        limits: of one test.
    """

    def __init__(self, at_once: int, limits: Limits) -> None:
        self._free, self._limits = threading.Semaphore(at_once), limits

    def grade(self, row: Row, text: str) -> Grade:
        """Run the last program of a response on all tests.

        Raises:
            SandboxError: this machine cannot confine programs.
            ValueError: the row's tests cannot be read.
        """
        place = find_program(text)
        if place is None:
            return Grade(scores={"accuracy": 0.0})
        program = text[place[0] : place[1]]
        with self._free:
            passed = passes(program, read_tests(row), self._limits)
        return Grade(scores={"accuracy": float(passed)}, answer=program)
