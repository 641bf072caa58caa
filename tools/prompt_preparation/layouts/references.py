"""Answers in the forms that graders read: a text, constraints of IFEval, or tests of LiveCodeBench."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.rows import show
from tools.prompt_preparation.drafts import Reference
from tools.prompt_preparation.layouts.conversations import parsed, reference_or_none
from tools.prompt_preparation.texts import normalised


def reference_of(value: object, what: str, grader: str | None) -> Reference:
    """Return the reference answer that a value of some nesting is.

    Tests of code are recognised by their form, whatever ``grader`` says.  A list of texts is the form of Skywork-OR1:
    several ways to write an answer, and only what can be written as one is kept.

    Raises:
        Fault: the value is none of the forms.
    """
    content = parsed(value)
    if (tests := _tests(content)) is not None:
        return Reference(answer=_json(tests), grader="code")
    if isinstance(content, list) and content and all(isinstance(item, str) for item in content):
        ways = {normalised(item): item for item in reversed(content)}
        if len(ways) > 1:
            return Reference(left_out="several reference answers")
        return reference_or_none(content[0], what, grader)
    if isinstance(content, dict) or _is_objects(content):
        return Reference(left_out="tests of another form than inputs and outputs")
    if grader == "code" and text_like(value):
        return Reference(left_out="a text where tests of code are expected")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return reference_or_none(value, what, grader)


def text_like(value: object) -> bool:
    """Return whether a value is a text that is not blank, or a number."""
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, int | float)


def _is_objects(content: object) -> bool:
    return isinstance(content, list) and bool(content) and all(isinstance(item, dict) for item in content)


# ---- tests of code ----


def _tests(content: object) -> list[dict[str, str]] | None:
    """Return the tests of two forms as one list; None where the value is no tests.

    The forms are ``{"inputs": [...], "outputs": [...], "fn_name": ...}`` (APPS, TACO, Skywork-OR1, NeMo Gym) and
    ``[{"input": ..., "output": ..., "testtype": ...}]`` (LiveCodeBench).
    """
    if isinstance(content, dict) and isinstance(content.get("inputs"), list):
        return _columns(content)
    if _is_objects(content):
        assert isinstance(content, list)
        if all({"input", "output"} <= set(item) for item in content):
            return [_listed(item) for item in content]
    return None


def _columns(content: dict[str, Any]) -> list[dict[str, str]] | None:
    inputs, outputs, name = content["inputs"], content.get("outputs"), content.get("fn_name")
    if not isinstance(outputs, list):
        return None
    if len(inputs) != len(outputs) or not inputs:
        raise Fault(f"tests with {len(inputs)} inputs and {len(outputs)} outputs", "as many outputs, and at least one")
    return [_test(given, wanted, name) for given, wanted in zip(inputs, outputs, strict=True)]


def _listed(item: dict[str, Any]) -> dict[str, str]:
    metadata = item.get("metadata")
    name = item.get("func_name") or item.get("fn_name")
    if name is None and isinstance(metadata, dict):
        name = metadata.get("func_name")
    if item.get("testtype") == "functional" and not name:
        raise Fault("a functional test without func_name", "the name of the function that is called")
    return _test(item["input"], item["output"], None if item.get("testtype") == "stdin" else name)


def _test(given: object, wanted: object, name: object) -> dict[str, str]:
    """Return one test.

    On stdin and stdout both are texts.  Of a function, the input has one line of JSON for each argument, and the output
    is JSON; values that are no text are arguments, or what is returned.
    """
    if not name:
        return {"input": _stdin(given), "output": _stdin(wanted), "testtype": "stdin"}
    if not isinstance(name, str):
        raise Fault(f"a test of the function {show(name)}", "a function's name")
    if not isinstance(given, str):
        given = "\n".join(_json(argument) for argument in given) if isinstance(given, list) else _json(given)
    wanted = wanted if isinstance(wanted, str) else _json(wanted)
    return {"input": given, "output": wanted, "testtype": "functional", "func_name": name}


def _stdin(value: object) -> str:
    """Return what a program reads or writes; a list of texts is its lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise Fault(f"a test with {show(value)} on stdin or stdout", "a text, or a list of lines")


# ---- constraints, choices ----


def constraints_of(ids: object, arguments: object) -> Reference:
    """Return the constraints of an instruction row, in the form of IFEval.

    Raises:
        Fault: names and arguments do not fit together.
    """
    names, kwargs = parsed(ids), parsed(arguments)
    kwargs = [{}] * len(names) if kwargs is None and isinstance(names, list) else kwargs
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise Fault(f"instruction_id_list is {show(names)}", "a list of the constraints' names")
    if not isinstance(kwargs, list) or len(kwargs) != len(names):
        raise Fault(f"kwargs is {show(kwargs)}", f"a list of {len(names)}, one for each constraint")
    constraints = []
    for name, given in zip(names, kwargs, strict=True):
        given = parsed(given) or {}
        if not isinstance(given, dict):
            raise Fault(f"kwargs of {show(name, 40)} is {show(given)}", "an object or null")
        # In Parquet every constraint has the keys of all; those that are not its own are null.
        own = {key: value for key, value in given.items() if value is not None}
        constraints.append({"instruction_id": name, "kwargs": own})
    return Reference(answer=_json(constraints), grader="instructions")


def choice_of(options: object, expected: object) -> Reference:
    """Return the letter of a multiple-choice row.

    Raises:
        Fault: it is none of the options.
    """
    listed = parsed(options)
    entries = listed if isinstance(listed, list) else [listed]
    letters = {str(letter).strip().upper() for entry in entries if isinstance(entry, dict) for letter in _given(entry)}
    answer = expected.strip().upper() if isinstance(expected, str) else expected
    if answer not in letters:
        raise Fault(f"the answer is {show(expected)}", f"a letter of the options: {', '.join(sorted(letters))}")
    return Reference(answer=answer, grader="choice")


def _given(entry: dict[str, Any]) -> list[str]:
    """Return the letters of an entry; in Parquet every entry has all letters, and those of others are null."""
    return [letter for letter, text in entry.items() if text is not None]


# ---- what is written ----


def check_reference(reference: Reference) -> None:
    """Check that an answer has the form that its grader reads.

    Raises:
        Fault: it has another.
    """
    answer, grader = reference.answer, reference.grader
    if answer is None or grader not in ("choice", "instructions", "code"):
        return
    if grader == "choice":
        if not (len(answer) == 1 and answer.isascii() and answer.isalpha()):
            raise Fault(f"the answer {show(answer)} for the grader choice", "one letter", "--grader")
        return
    keys = {"instructions": {"instruction_id", "kwargs"}, "code": {"input", "output", "testtype"}}[grader]
    content = parsed(answer)
    fits = _is_objects(content) and all(keys <= set(item) for item in content)  # type: ignore[attr-defined]
    if not fits:
        wanted = f"a JSON list of objects with {', '.join(sorted(keys))}"
        raise Fault(f"the answer {show(answer)} for the grader {grader}", wanted, "--grader")


def _json(value: object) -> str:
    """Return a value as JSON text, with the keys in their order; infinities have no JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        raise Fault(f"a test with the value {value}", "finite numbers")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError):
        raise Fault(f"an answer with {show(value)}", "values that JSON has") from None
