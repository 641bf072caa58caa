"""The letter that a response chooses: hand-made cases, and time that is linear in the text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.grading.choices import LETTERS
from megatron_tropd.grading.grader import make_grader
from tests.grading_cases.choices import CASES, LENIENT

STRICT = make_grader("choice")
LOOSE = make_grader("choice", lenient=True)


def _chosen(grader, response):
    """The letters for which the response is right."""
    return "".join(letter for letter in LETTERS if grader.right(response, True, letter))


def test_there_are_enough_cases():
    assert len({response for response, _ in CASES}) >= 60


@pytest.mark.parametrize(("response", "letter"), CASES)
def test_a_stated_choice(response, letter):
    assert _chosen(STRICT, response) == letter
    assert not any(STRICT.right(response, False, one) for one in LETTERS), "it was cut off"


@pytest.mark.parametrize(("response", "letter"), LENIENT)
def test_the_lenient_form_takes_the_last_letter_that_stands_alone(response, letter):
    assert _chosen(LOOSE, response) == letter


@pytest.mark.parametrize(("response", "letter"), [case for case in CASES if case[1]])
def test_the_lenient_form_agrees_where_there_is_a_statement(response, letter):
    assert _chosen(LOOSE, response) == letter


def test_the_place_of_the_letter_is_known():
    response = "<think>B</think> The answer is (C)."
    answer = STRICT.answer(response)
    assert (answer.text, answer.start) == ("C", response.index("C)"))


PIECES = [
    "Answer: ",
    "the answer is ",
    r"\boxed{",
    "}",
    "A",
    "C",
    "I",
    " or ",
    ", ",
    "(",
    ")",
    "*",
    "$",
    "'",
    ".",
    " x",
    "\n",
]


@given(st.lists(st.sampled_from(PIECES), max_size=16).map("".join))
def test_at_most_one_letter_is_right_and_leniency_only_adds(text):
    strict, loose = _chosen(STRICT, text), _chosen(LOOSE, text)
    assert len(strict) <= 1 and len(loose) <= 1
    assert loose == strict if strict else True


LONG = [r"\boxed{" + " " * 10**6 + "}", "answer is " + "*" * 10**6, "answer: " * 10**5, "A " * 10**5, "answer" + " " * 10**6 + ":",
        r"\boxed{\text " + " " * 10**6, "Answer: A" + " " * 10**6 + "or B"]  # fmt: skip


def test_long_responses_take_linear_time():
    begin = time.process_time()
    for text in LONG:
        LOOSE.right(text, True, "C")
    assert time.process_time() - begin < 10
