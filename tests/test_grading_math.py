"""Grading as mathematics: hand-made cases, and answers that are meant to do harm."""

from __future__ import annotations

import signal
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.grading import references
from megatron_tropd.grading.grader import make_grader
from megatron_tropd.grading.references import check_references
from megatron_tropd.grading.workers import Workers
from tests.grading_cases.mathematics import CASES

MATH, EXACT = replace(make_grader("math"), workers=Workers(1, cpu_seconds=0.4)), make_grader("exact")
PATIENT = replace(make_grader("math"), workers=Workers(1, cpu_seconds=5.0))
"""For answers that are right or wrong, however slow the machine."""


def test_there_are_enough_cases():
    assert len({response for response, _, _ in CASES}) >= 60


@pytest.mark.slow
@pytest.mark.parametrize(("response", "reference", "right"), CASES, ids=range(len(CASES)))
def test_mathematics(response, reference, right):
    assert PATIENT.right(response, True, reference) is right
    assert not PATIENT.right(response, False, reference), "it was cut off"


HOSTILE = [
    "9^{9^{9^9}}", "9**9**9**9", "10000000!", r"\sum_{n=1}^{10^9} n^n",
    "{" * 400 + "7" + "}" * 400, "(" * 400 + "7" + ")" * 400, r"\frac{" * 100 + "7" + "}" * 100, "9" * 1000,
    "7" + "!" * 100, "1e999999999", "\ud800", "\0", "\u202e7", "7" * 10**6, "+".join("x" * 10**5),
]  # fmt: skip


@pytest.mark.slow
def test_hostile_answers_are_wrong_and_do_not_disturb_the_next():
    for number, answer in enumerate(HOSTILE):
        assert MATH.right(f"\\boxed{{{answer}}}", True, "7-x") is False, answer[:40]
        assert MATH.right(rf"\boxed{{\frac{{{2 * number}}}{{2}}}}", True, str(number)), "not a remembered verdict"


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "\\", "7", " ", r"\{", "x", r"\frac", "^", "9", r"\sqrt{", "(", ")", "$", "\ud800", "\0", "=", ",", r"\text{", "!"]), max_size=25).map("".join))  # fmt: skip
def test_grading_never_raises_and_mathematics_contains_text(text):
    response = f"\\boxed{{{text}}}"
    assert MATH.right(response, True, "7") in (True, False)
    if EXACT.right(response, True, text):
        assert MATH.right(response, True, text)


@pytest.mark.slow
def test_the_alarm_signal_is_left_to_others_and_threads_can_grade():
    """The timeouts of math-verify are SIGALRM handlers; a trainer may have one of its own."""
    rung, verdicts = [], []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        grader = MATH
        thread = threading.Thread(target=lambda: verdicts.append(grader.right(r"\boxed{28/4}", True, "7")))
        thread.start()
        thread.join()
        assert verdicts == [True] and not grader.right(r"\boxed{9^{9^{9^9}}}", True, "7")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0 and not rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_a_verdict_is_remembered(monkeypatch):
    grader = make_grader("math")
    assert grader.right(r"\boxed{14/2}", True, "7") and not grader.right(r"\boxed{14/2}", True, "8")
    monkeypatch.setattr(grader.workers, "ask", lambda *_: pytest.fail("asked again"))
    assert grader.right(r"so \boxed{14/2}", True, "7") and not grader.right(r"\boxed{14/2}!", True, "8")


def test_a_missing_package_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr(references.importlib.util, "find_spec", lambda name: None)
    (fault,) = check_references([(0, "7", ""), (1, "C", "choice")], "math")
    assert "needs math-verify, which is not installed: pip install math-verify, or use --grader exact (1 rows" in fault
