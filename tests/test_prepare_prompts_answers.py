"""The forms in which data sets keep an answer, and what becomes of each."""

from __future__ import annotations

import json

import pytest

from megatron_tropd.data.encoding.row_format import Fault
from tools.prompt_preparation.drafts import Reference
from tools.prompt_preparation.layouts.references import check_reference, choice_of, constraints_of, reference_of


def code(*tests):
    return Reference(answer=json.dumps(list(tests)), grader="code")


def stdin(given, wanted):
    return {"input": given, "output": wanted, "testtype": "stdin"}


def call(given, wanted, name="f"):
    return {"input": given, "output": wanted, "testtype": "functional", "func_name": name}


MATH = [
    ("18", "18"), (" 18 ", " 18 "), (18, "18"), (0.5, "0.5"), ('["18"]', "18"), (["18"], "18"), ([18], "18"),
    ('["x=1", "X = 1", "x=1"]', None), ('["a b", "A  B"]', "a b"), ("[1, 2]", "[1, 2]"), ("[0, 1)", "[0, 1)"), ("[18]", "[18]"),
    ("{1, 2}", "{1, 2}"), ("[", "["), ("\\frac{1}{2}", "\\frac{1}{2}"), ("\u00bd", "\u00bd"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "answer"), MATH, ids=repr)
def test_texts(value, answer):
    found = reference_of(value, "answer", "math")
    if answer is None:
        assert found == Reference(left_out="several reference answers")
    else:
        assert found == Reference(answer=answer, grader="math")


@pytest.mark.parametrize("value", [None, "", "  \n"])
def test_no_answer(value):
    assert reference_of(value, "answer", "math") == Reference()


TESTS = [
    ({"inputs": ["1\n", "2\n"], "outputs": ["3\n", "4\n"]}, code(stdin("1\n", "3\n"), stdin("2\n", "4\n"))),
    ({"inputs": [["1", "2"]], "outputs": [["3", "4"]], "fn_name": None}, code(stdin("1\n2", "3\n4"))),
    ({"inputs": ["[1, 2]\n3"], "outputs": ["[1]"], "fn_name": "f"}, code(call("[1, 2]\n3", "[1]"))),
    ({"inputs": [[[1, 2], "s"]], "outputs": [{"a": None}], "fn_name": "f"}, code(call('[1, 2]\n"s"', '{"a": null}'))),
    ({"inputs": [3], "outputs": [True], "fn_name": "f"}, code(call("3", "true"))),
    ([stdin("1", "2")], code(stdin("1", "2"))),
    ([{"input": "1", "output": "2", "type": "stdin_stdout"}], code(stdin("1", "2"))),
    ([call("1", "2", "g")], code(call("1", "2", "g"))),
    ([{**call("1", "2"), "func_name": None, "metadata": {"func_name": "h"}}], code(call("1", "2", "h"))),
]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(("value", "expected"), TESTS)
def test_tests_of_code(value, expected, as_text):
    found = reference_of(json.dumps(value) if as_text else value, "answer", None)
    assert found == expected
    check_reference(found)
    assert reference_of(found.answer, "answer", None) == found


@pytest.mark.parametrize("value", [{"assert_case": ["assert f(1) == 2"]}, [{"question_id": "abc"}], {"inputs": ["1"]}])
def test_tests_that_no_grader_reads_are_left_out(value):
    assert reference_of(value, "answer", "code").left_out == "tests of another form than inputs and outputs"
    assert reference_of("42", "answer", "code").left_out == "a text where tests of code are expected"


BAD = [
    ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
    ({"inputs": [], "outputs": []}, "0 inputs and 0 outputs"),
    ({"inputs": [{"a": 1}], "outputs": ["1"]}, "on stdin or stdout"),
    ({"inputs": ["1"], "outputs": ["1"], "fn_name": 5}, "the function 5"),
    ([{"input": "1", "output": "2", "testtype": "functional"}], "without func_name"),
    ({"inputs": [[float("inf")]], "outputs": ["1"], "fn_name": "f"}, "inf"),
    ([1, 2], "is a list"),
    (True, "is a bool"),
    (float("nan"), "is nan"),
    ("a\0b", "NUL"),
]


@pytest.mark.parametrize(("value", "found"), BAD)
def test_what_is_no_answer_is_a_fault(value, found):
    with pytest.raises(Fault, match=found):
        reference_of(value, "answer", "math")


def test_constraints():
    found = constraints_of('["a:b", "c:d", "e:f"]', [None, '{"n": 2}', {"n": None, "m": [1]}])
    assert json.loads(found.answer) == [
        {"instruction_id": "a:b", "kwargs": {}},
        {"instruction_id": "c:d", "kwargs": {"n": 2}},
        {"instruction_id": "e:f", "kwargs": {"m": [1]}},
    ]
    check_reference(found)
    assert json.loads(constraints_of(["a:b"], None).answer) == [{"instruction_id": "a:b", "kwargs": {}}]
    for ids, kwargs, message in (
        (["a"], [], "kwargs"), ("a", [{}], "instruction_id_list"), ([1], [{}], "names"), (["a"], [3], "kwargs of 'a'")
    ):  # fmt: skip
        with pytest.raises(Fault) as caught:
            constraints_of(ids, kwargs)
        assert message in f"{caught.value.found} {caught.value.expected}"


def test_choices():
    options = [{"A": "x", "B": None}, {"A": None, "B": "y"}]  # as Parquet has them
    assert choice_of(options, " b ") == choice_of({"a": "x", "b": "y"}, "B") == Reference(answer="B", grader="choice")
    for expected in ("C", "x", None, 1):
        with pytest.raises(Fault, match="the answer is"):
            choice_of(options, expected)


@pytest.mark.parametrize(
    ("grader", "answer"),
    [
        ("choice", "AB"),
        ("choice", "1"),
        ("code", "42"),
        ("code", '[{"input": "1"}]'),
        ("code", "[]"),
        ("instructions", "{}"),
    ],
)
def test_an_answer_that_its_grader_cannot_read(grader, answer):
    with pytest.raises(Fault, match=f"for the grader {grader}"):
        check_reference(Reference(answer=answer, grader=grader))
