"""Grading: which answer of a response counts, and workers that survive what models write."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.config import EvaluationConfig
from megatron_tropd.grading import workers
from megatron_tropd.grading.answers import after_thinking, braces_balance, last_box, last_match, normalized
from megatron_tropd.grading.grader import Question, make_grader
from megatron_tropd.grading.references import check_references
from megatron_tropd.grading.workers import GradingError, Worker, Workers
from megatron_tropd.types import GraderKind

EXACT = make_grader("exact")


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
    place = last_match(text, re.compile(pattern))
    assert (place and normalized(text[slice(*place)])) == answer


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
    found = EXACT.answer(text)
    assert (found and found.text) == answer
    assert found is None or text[found.start :].lstrip().startswith(answer[:1])


PIECES = [r"\boxed{", "{", "}", "\\", "7", " ", r"\{", "x"]


def _boxes(text):
    """(start, end) of the content of every box that closes, by trying every place."""
    tokens = [match.span() for match in re.finditer(r"\\.|.", text, re.DOTALL)]
    pieces = {start: text[start:end] for start, end in tokens}
    for at in pieces:
        opened = re.compile(r"\\boxed\s*\{").match(text, at)
        if opened is None or pieces[at] != r"\b":
            continue
        depth = 1
        for start in (start for start in pieces if start >= opened.end()):
            depth += {"{": 1, "}": -1}.get(pieces[start], 0)
            if depth == 0:
                yield opened.end(), start
                break


@given(st.lists(st.sampled_from(PIECES), max_size=24).map("".join))
def test_the_last_box_is_that_of_a_search_from_every_place(text):
    assert last_box(text) == max(_boxes(text), default=None)


@pytest.mark.parametrize(
    ("response", "said"),
    [
        ("7", "7"),
        ("  7\n", "7"),
        ("<think>6</think>\n\n7", "7"),
        ("6</think>7", "7"),
        ("<think>5</think>6<think></think> 7", "7"),
        ("[THINK]6[/THINK]7", "7"),
        ("<reasoning>6</reasoning><think>x</think>7", "7"),
        ("<think>7", None),
        ("\n<think>7", None),
        ("<think>6</think>", None),
        ("<think>6</think> \n", None),
        ("", None),
        ("we write <think> here: 7", "we write <think> here: 7"),
        ("</think", "</think"),
    ],
)
def test_what_a_response_says_after_its_thoughts(response, said):
    found = after_thinking(response)
    assert (found and found.text) == said
    assert found is None or response[found.start :].rstrip() == said


def test_right_needs_an_ended_response_and_the_whole_answer():
    grader = make_grader("exact", r"#\s*(.*)$")
    assert grader.right("x # 1 2", True, " 1  2")
    assert not grader.right("x # 1 2", False, "1 2")
    assert not grader.right("x # 1 2", True, "1")
    assert not grader.right("x 1 2", True, "1 2")
    assert not grader.right("<think># 1 2</think> yes", True, "1 2")


def test_a_row_may_name_its_grader_and_many_are_graded_at_one_time():
    rows = [("# 7", "7", ""), ("Answer: C", "C", "choice"), (r"# 8 \boxed{7}", "7", "exact"), ("# 7", "8", ""), ("# C", "C", "choice")]  # fmt: skip
    grader = make_grader("exact", r"# ?(\d)")
    questions = [Question(response=r, finished=True, reference=a, grader=name) for r, a, name in rows] * 9
    assert grader.all_right(questions) == [True, True, False, False, False] * 9
    assert grader.of_row("choice").right("Answer: C", True, "C") and grader.of_row("") is grader


@pytest.mark.parametrize("text", [r"\boxed{" * 10**5, r"\boxed{7}" * 10**5, "{" * 10**6, "\\" * 10**6, r"\boxed" + " " * 10**6,
                                  "<think>" * 10**5 + "</think>" + r"\boxed{7}"],
                         ids=["open boxes", "boxes", "braces", "backslashes", "spaces", "thoughts"])  # fmt: skip
def test_long_responses_take_linear_time(text):
    begin = time.process_time()
    assert EXACT.right(text, True, "7") is text.endswith("7}")
    assert time.process_time() - begin < 10


def test_a_pattern_that_would_search_for_ever_is_ended():
    """No answer was found in time, so the response is wrong; the next one is graded."""
    grader = replace(make_grader("exact", r"((?:a|a)*)b"), workers=Workers(1, cpu_seconds=0.2))
    assert not grader.right("a" * 64, True, "a")  # 2^64 steps
    assert grader.right("aab", True, "aa")


def test_an_interrupted_question_leaves_no_reply_behind(monkeypatch):
    worker = Worker()
    assert worker.ask("find", "a1", r"a(\d)") == [1, 2]

    def interrupted(process, question):
        print(question, file=process.stdin, flush=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers, "_exchange", interrupted)
        worker.ask("find", "a1", r"a(\d)")
    assert worker.ask("find", "ba1", r"a(\d)") == [2, 3] and worker.ask("find", "b", r"a(\d)") is None
    worker.close()


def test_threads_share_the_workers():
    pool, found = Workers(2), []
    asking = [
        threading.Thread(target=lambda n=n: found.append((n, pool.ask("find", "x" * n + "y", "(y)"))))
        for n in range(16)
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert sorted(found) == [(n, [n, n + 1]) for n in range(16)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise SystemExit(3)", r"did not start \(exit code 3\)"),
        ("print('ready', flush=True)\ninput()\nraise SystemExit(4)", "ended with exit code 4"),
        ("print('ready', flush=True)\ninput()\nimport time\ntime.sleep(600)", "no answer for 1 seconds"),
    ],
)
def test_a_worker_that_cannot_work_is_an_error_and_not_a_wrong_answer(monkeypatch, tmp_path, source, message):
    """Otherwise every response would be wrong, and nobody would know why."""
    (tmp_path / "broken_worker.py").write_text(source)
    monkeypatch.setattr(workers, "_ROOT", tmp_path)
    monkeypatch.setattr(workers, "_MODULE", "broken_worker")
    monkeypatch.setattr(workers, "WALL_SECONDS", 1.0)
    with pytest.raises(GradingError, match=message):
        Worker().ask("find", "a", "(a)")


def test_an_error_of_a_task_has_its_reason():
    worker = Worker()
    with pytest.raises(GradingError, match=r"failed at find: error: .*unterminated"):
        worker.ask("find", "a", "(")
    assert worker.ask("find", "a", "(a)") == [0, 1], "the worker goes on"


def test_a_worker_starts_without_torch():
    code = "import sys, megatron_tropd.grading.worker as w; w._task('find'); w._task('follow'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(("cores", "ranks", "size"), [(2, 2, 1), (2, 1, 2), (3, 2, 1), (1, 4, 1), (64, 2, 8)])
def test_a_rank_has_its_share_of_the_cores(monkeypatch, cores, ranks, size):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert workers.share_of_cores() == size


def test_settings_that_cannot_be_used():
    with pytest.raises(ValueError, match=r"--answer-pattern '\(' is not a regular expression"):
        make_grader("exact", "(")
    with pytest.raises(ValueError, match="--answer-pattern 'abc' has no group; put the answer in parentheses"):
        make_grader("exact", "abc")


def test_every_grader_has_a_check_of_its_references():
    assert EvaluationConfig().grader in get_args(GraderKind)
    for kind in get_args(GraderKind):
        assert not any("names the grader" in fault for fault in check_references([(0, "7", kind)], "exact"))
    (fault,) = check_references([(3, "7", "rule"), (4, "7", "")], "exact")
    assert "the grader 'rule', expected one of exact, math, choice, instructions, code (see --grader-key)" in fault
    assert "(1 rows, first: uid 3)" in fault


def test_references_that_no_response_can_give():
    answers = ["7", " ", 7, "nan", r"\frac{1}{", "x" * 2000, ["7"], "AB", "K", "c"]
    rows = [(uid, answer, "") for uid, answer in enumerate(answers)]
    of = {kind: " ".join(check_references(rows, kind)) for kind in ("exact", "math", "choice")}
    for text in ("blank", "is a int", "is a list", "'nan'"):
        assert all(text in faults for faults in of.values())
    for text in ("braces that do not balance", "1000 characters"):
        assert text in of["math"] and text not in of["exact"]
    assert "(1 rows, first: uid 4)" in of["math"]
    for letter in ("'AB'", "'K'", "'c'", "'7'"):
        assert f"{letter}, expected a capital letter from A to J" in of["choice"]
    assert not check_references([(0, "7", ""), (1, " J ", "choice")], "math")


def test_the_documented_references_can_be_graded():
    text = (Path(__file__).resolve().parent.parent / "docs" / "grading.md").read_text()
    constraints, tests = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert not check_references([(0, constraints, "instructions"), (1, tests, "code")], "exact")


@pytest.mark.parametrize("text", ["", "7", r"\frac{1}{2}", r"\{ 1 \}", r"\left\{ x", r"\boxed{7}", "{}{{}}", r"\\{}"])
def test_balanced_braces(text):
    assert braces_balance(text)
    assert not braces_balance(text + "{") and not braces_balance("}" + text) and not braces_balance("}" + text + "{")
