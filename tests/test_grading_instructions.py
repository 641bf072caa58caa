"""Constraints of IFEval: hand-made cases of every kind, references that are none, texts that take for ever."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_tropd.grading import references
from megatron_tropd.grading.constraints import CONSTRAINTS, count_sentences
from megatron_tropd.grading.grader import make_grader
from megatron_tropd.grading.references import check_references
from megatron_tropd.grading.workers import Workers
from tests.grading_cases.instructions import BAD, CASES, LANGUAGE, one

STRICT = replace(make_grader("instructions"), workers=Workers(1, cpu_seconds=0.5))
LOOSE = replace(STRICT, lenient=True)


def test_there_are_enough_cases_and_one_of_every_kind_that_is_right_and_one_that_is_wrong():
    assert len(CASES) >= 60 and len(CONSTRAINTS) == 25
    alone = [(items[0]["instruction_id"], strict) for items, _, strict, _ in CASES + LANGUAGE if len(items) == 1]
    assert set(alone) == {(name, verdict) for name in CONSTRAINTS for verdict in (True, False)}


@pytest.mark.parametrize(
    ("constraints", "response", "strict", "loose"), CASES + LANGUAGE, ids=range(len(CASES + LANGUAGE))
)
def test_constraints(constraints, response, strict, loose):
    reference = json.dumps(constraints)
    assert STRICT.right(response, True, reference) is strict
    assert LOOSE.right(response, True, reference) is loose
    assert not LOOSE.right(response, False, reference), "it was cut off"


@pytest.mark.parametrize(("reference", "fault"), BAD, ids=range(len(BAD)))
def test_references_that_are_no_constraints(reference, fault):
    (found,) = check_references([(3, reference, "instructions"), (5, json.dumps([one("punctuation:no_comma")]), "instructions")], "exact")  # fmt: skip
    assert fault in found and found.endswith("(1 rows, first: uid 3)")


def test_kwargs_as_tables_keep_them():
    """All columns are there, null where another kind needs them, and integers beside nulls are floats."""
    reference = '[{"instruction_id": "length_constraints:nth_paragraph_first_word", "kwargs": {"num_paragraphs": 2.0, "nth_paragraph": 2.0, "first_word": "b", "keywords": null}}, {"instruction_id": "punctuation:no_comma", "kwargs": null}]'
    assert not check_references([(0, reference, "instructions")], "exact")
    assert STRICT.right("a\n\nb", True, reference) and not STRICT.right("a\n\nc", True, reference)


def test_a_missing_detector_of_languages_is_found_before_the_run(monkeypatch):
    monkeypatch.setattr(references.importlib.util, "find_spec", lambda name: None)
    rows = [(uid, json.dumps(items), "instructions") for uid, (items, *_) in enumerate(CASES[:1] + LANGUAGE[:1])]
    (fault,) = check_references(rows, "exact")
    assert "pip install 'megatron-tropd[instructions]' (1 rows, first: uid 1)" in fault


def test_a_text_that_takes_for_ever_follows_nothing():
    brackets = json.dumps([one("detectable_content:number_placeholders", num_placeholders=0)])
    assert not STRICT.right("[" * 10**6, True, brackets)
    assert STRICT.right("[a]", True, brackets)


@pytest.mark.parametrize(
    ("text", "count"),
    [("", 0), (" \n", 0), ("no end", 1), ("One. Two.", 2), ("One.Two.", 1), ("What?! No...", 2), ("I. Am", 2),
     ("See fig. 3 and Mr. Xu. It is 2.5 m.", 2), ("(One.) [Two.]", 2), ("**One.** *Two!*", 2), ("...", 0)],
)  # fmt: skip
def test_sentences(text, count):
    assert count_sentences(text) == count


def test_the_tables_of_languages_are_read_before_a_question_has_its_time():
    """They take a part of a second where the machine is idle, and more than a question has where it is not."""
    code = (
        "from megatron_tropd.grading import worker\n"
        "import langdetect.detector_factory as tables\n"
        "assert tables._factory is None\n"
        "worker._task('follow')\n"
        "assert tables._factory is not None"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
