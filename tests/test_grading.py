"""Grading: which answer of a response counts, what is equal to what, and responses that are meant to do harm."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.grading import grader as grading
from megatron_tropd.grading import math_process
from megatron_tropd.grading.answers import braces_balance, find_answer
from megatron_tropd.grading.grader import check_references, make_grader
from megatron_tropd.grading.math_process import GradingError, MathProcess

EXACT = make_grader("exact", "")
MATH = make_grader("math", "")


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("so # 1 2 3", r"#\s*(.*)$", "1 2 3"),
        ("#  4\t2 \n", r"#\s*(.*)$", "4 2"),
        ("# 1 # 2", r"#\s*(.*)$", "1 # 2"),
        (r"\boxed{7} then \boxed{8}", r"\\boxed\{(.*?)\}", "8"),
        ("= 1\n= 2\n", r"= *(.+)", "2"),
        ("no answer", r"#\s*(.*)$", None),
        ("a", r"a|(b)", None),
        ("b a", r"a|(b)", "b"),
        ("all of it", r"(?s)(.*)", "all of it"),
    ],
)
def test_the_last_match_of_a_pattern_counts(text, pattern, answer):
    found = find_answer(text, re.compile(pattern))
    assert (found and found.text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7} then \boxed{8}", "8"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{ \text{a {b} c}  d }.", r"\text{a {b} c} d"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{x = \boxed{7}}", "7"),
        (r"\boxed{7} and \boxed{8", "7"),
        (r"} { \boxed{7} }", "7"),
        (r"\boxed{{7}", None),
        (r"a line \\boxed{7}", None),
        (r"\boxed{}", ""),
        ("7", None),
    ],
)
def test_the_last_box_with_balanced_braces_counts(text, answer):
    found = find_answer(text, None)
    assert (found and found.text) == answer
    assert found is None or text[found.start :].lstrip().startswith(answer[:1])


PIECES = [r"\boxed{", "{", "}", "\\", "7", " ", r"\{", "x"]


def _boxes(text):
    """(start, content) of every box that closes, by trying every place."""
    tokens = [match.span() for match in re.finditer(r"\\.|.", text, re.DOTALL)]
    pieces = {start: text[start:end] for start, end in tokens}
    for at in pieces:
        opened = re.compile(r"\\boxed\s*\{").match(text, at)
        if opened is None or pieces[at] != r"\b":
            continue
        depth, place = 1, opened.end()
        for start in (start for start in pieces if start >= opened.end()):
            depth += {"{": 1, "}": -1}.get(pieces[start], 0)
            place = start
            if depth == 0:
                yield opened.end(), text[opened.end() : place]
                break


@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_the_last_box_is_that_of_a_search_from_every_place(text):
    found, boxes = find_answer(text, None), list(_boxes(text))
    assert (found and (found.start, found.text)) == (
        max(boxes) and (max(boxes)[0], " ".join(max(boxes)[1].split())) if boxes else None
    )


def test_right_needs_an_ended_response_and_the_whole_answer():
    grader = make_grader("exact", r"#\s*(.*)$")
    assert grader.right("x # 1 2", True, " 1  2")
    assert not grader.right("x # 1 2", False, "1 2")
    assert not grader.right("x # 1 2", True, "1")
    assert not grader.right("x 1 2", True, "1 2")


EQUAL = [
    ("1,024", "1024"), ("1024", "1,024"), ("204.0", "204"), ("204", "204.0"), (r"\frac{1}{2}", "0.5"),
    (r"\frac12", "1/2"), (r"\dfrac{3}{4}", "0.75"), (r"\text{Paris}", "Paris"), ("paris", r"\text{Paris}"),
    (r"\mathrm{ New  York }", "New York"), ("x^2+2x+1", "(x+1)^2"), (r"\sqrt{2}", "2^{1/2}"), (r"\{1,2\}", r"\{2,1\}"),
    ("(1,2)", "(1, 2)"), ("x=3", "3"), (r"7\text{ cm}", "7"), ("7.", "7"), ("$7$", "7"), (r"\$7", "7"), ("007", "7"),
    ("10^3", "1000"), ("1 2", "1  2"), ("5:00", "5:00"), ("0.333333", "1/3"), (r"\left(3, \frac{\pi}{2}\right)", r"(3,\pi/2)"),
]  # fmt: skip
UNEQUAL = [
    ("7", "8"), ("-3", "3"), ("1,02", "102"), ("12", "1 2"), ("1 2", "2 1"), ("1 2", "3"), ("(1,2)", "(2,1)"),
    ("east", "eats"), ("listen", r"\text{silent}"), (r"\text{even}", r"\text{odd}"), ("Paris", "London"),
    ("5:00", "6:00"), ("1/0", "2/0"), ("0.33", "1/3"), ("not 7 but 8", "7"), ("", "7"), ("x+1", "x+2"), ("A", "B"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "reference", "equal"), [(*p, True) for p in EQUAL] + [(*p, False) for p in UNEQUAL])
def test_mathematics(answer, reference, equal):
    response = f"First \\boxed{{1}}, then \\boxed{{{answer}}}."
    assert MATH.right(response, True, reference) is equal
    assert not MATH.right(response, False, reference)


def test_exact_compares_texts():
    assert not any(EXACT.right(f"\\boxed{{{a}}}", True, b) for a, b in EQUAL if a.split() != b.split())


HOSTILE = [
    "9^{9^{9^9}}", "9**9**9**9", "10000000!", r"\binom{10^9}{10^8}", r"\sum_{n=1}^{10^9} n^n", "(x+1)^{100000}",
    "{" * 400 + "7" + "}" * 400, "(" * 400 + "7" + ")" * 400, r"\frac{" * 100 + "7" + "}" * 100, "9" * 1000,
    "-" * 900 + "7", "7" + "!" * 100, "1e999999999", "\ud800", "\0", "\u202e7", "7" * 10**6, "+".join("x" * 10**5),
]  # fmt: skip


@pytest.mark.slow
def test_hostile_answers_are_wrong_and_do_not_disturb_the_next():
    for answer in HOSTILE:
        assert MATH.right(f"\\boxed{{{answer}}}", True, "7-x") is False, answer[:40]
        assert MATH.right(r"\boxed{\frac{14}{2}}", True, "7")


@pytest.mark.parametrize("grader", [EXACT, MATH], ids=["exact", "math"])
@pytest.mark.parametrize("text", [r"\boxed{" * 10**5, r"\boxed{7}" * 10**5, "{" * 10**6, "\\" * 10**6, r"\boxed" + " " * 10**6],
                         ids=["open boxes", "boxes", "braces", "backslashes", "spaces"])  # fmt: skip
def test_long_responses_take_linear_time(grader, text):
    begin = time.process_time()
    assert grader.right(text, True, "7") is text.endswith("7}")
    assert time.process_time() - begin < 10


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([*PIECES, r"\frac", "^", "9", r"\sqrt{", "(", ")", "$", "\ud800", "\0", "=", ",", r"\text{", "!"]), max_size=25).map("".join))  # fmt: skip
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
        grader = make_grader("math", "")
        thread = threading.Thread(target=lambda: verdicts.append(grader.right(r"\boxed{14/2}", True, "7")))
        thread.start()
        thread.join()
        assert verdicts == [True] and not grader.right(r"\boxed{9^{9^{9^9}}}", True, "7")
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0 and not rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_an_interrupted_question_leaves_no_reply_behind(monkeypatch):
    process = MathProcess()
    assert process.equal("14/2", "7")

    def interrupted(worker, question):
        print(question, file=worker.stdin, flush=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(math_process, "_ask", interrupted)
        process.equal("14/2", "7")
    assert not process.equal("1", "7") and process.equal("14/2", "7")
    process.close()


@pytest.mark.slow
def test_a_process_that_cannot_work_is_an_error_and_not_a_wrong_answer(monkeypatch, tmp_path):
    """Otherwise every response would be wrong, and nobody would know why."""
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(math_process, "_WORKER", worker)
    worker.write_text("raise SystemExit(3)")
    with pytest.raises(GradingError, match=r"did not start \(exit code 3\)"):
        MathProcess().equal("1", "2")
    worker.write_text("print('ready', flush=True)\ninput()\nraise SystemExit(4)")
    with pytest.raises(GradingError, match="ended with exit code 4"):
        MathProcess().equal("1", "2")


def test_settings_that_cannot_be_used(monkeypatch):
    with pytest.raises(ValueError, match=r"--answer-pattern '\(' is not a regular expression"):
        make_grader("exact", "(")
    with pytest.raises(ValueError, match="--answer-pattern 'abc' has no group; put the answer in parentheses"):
        make_grader("exact", "abc")
    monkeypatch.setattr(grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package math-verify.*megatron-tropd\[math\]"):
        make_grader("math", "")


def test_the_default_pattern_of_before_still_finds_flat_boxes():
    grader = make_grader("exact", r"\\boxed\{([^{}]*)\}")
    assert grader.right(r"\boxed{6} \boxed{7}", True, "7")


def test_references_that_no_response_can_give():
    answers = ["7", None, " ", 7, "nan", r"\frac{1}{", "x" * 2000, ["7"]]
    pairs = [(uid, answer) for uid, answer in enumerate(answers) if answer is not None]
    of = {kind: " ".join(check_references(pairs, kind)) for kind in ("exact", "math")}
    for text in ("blank", "is a int", "is a list", "'nan'"):
        assert text in of["exact"] and text in of["math"]
    for text in ("braces that do not balance", "1000 characters"):
        assert text in of["math"] and text not in of["exact"]
    assert "(1 rows, first: uid 5)" in of["math"]
    assert not check_references(pairs[:1], "math")


@pytest.mark.parametrize("text", ["", "7", r"\frac{1}{2}", r"\{ 1 \}", r"\left\{ x", r"\boxed{7}", "{}{{}}", r"\\{}"])
def test_balanced_braces(text):
    assert braces_balance(text)
    assert not braces_balance(text + "{") and not braces_balance("}" + text) and not braces_balance("}" + text + "{")


def test_the_process_is_started_without_the_package():
    """It starts in half a second because it imports no torch."""
    source = Path(math_process._WORKER).read_text()
    assert "megatron_tropd" not in source.split('"""', 2)[2]
