"""LiveCodeBench's tests, read from a row of its files without running anything that the file holds.

Private tests are published as base64 of a zlib stream of a pickle of a JSON text.  Unpickling may call any function, so
the pickle's instructions are read instead: only those that make one text are accepted.
"""

from __future__ import annotations

import base64
import binascii
import json
import pickletools
import zlib
from collections.abc import Mapping
from typing import Any, Literal

from megatron_tropd.grading.programs import ProgramTest

_AROUND_A_TEXT = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}


def read_tests(row: Mapping[str, Any]) -> list[ProgramTest]:
    """Return public and private tests of a problem.

    Raises:
        ValueError: a column does not hold what LiveCodeBench publishes there.
    """
    metadata = json.loads(row["metadata"])
    function = metadata.get("func_name") or "" if isinstance(metadata, dict) else None
    if not isinstance(function, str):
        raise ValueError("metadata is no object with the name of a function, or none")
    kind: Literal["functional", "stdin"] = "functional" if function else "stdin"
    tests = []
    for column in ("public_test_cases", "private_test_cases"):
        for test in _cases(row[column], column):
            if not isinstance(test, dict) or not all(isinstance(test.get(key), str) for key in ("input", "output")):
                raise ValueError(f"{column} has a test without the texts input and output")
            tests.append(ProgramTest(kind=kind, input=test["input"], output=test["output"], function=function))
    if not tests:
        raise ValueError("the problem has no tests")
    return tests


def _cases(value: str, column: str) -> list[Any]:
    try:
        cases = json.loads(value)
    except ValueError:
        cases = json.loads(_pickled_text(value, column))
    if not isinstance(cases, list):
        raise ValueError(f"{column} is no list of tests")
    return cases


def _pickled_text(value: str, column: str) -> str:
    try:
        pickled = zlib.decompress(base64.b64decode(value, validate=True))
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"{column} is neither JSON nor compressed tests: {error}") from error
    texts = []
    for instruction, argument, _ in pickletools.genops(pickled):
        if instruction.name in _TEXT:
            texts.append(argument)
        elif instruction.name not in _AROUND_A_TEXT:
            raise ValueError(f"{column} holds a pickle of more than a text ({instruction.name}); it was not unpickled")
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ValueError(f"{column} holds a pickle that is not one text")
    return texts[0]
