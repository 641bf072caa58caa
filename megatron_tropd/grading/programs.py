"""Programs that a response gives, and tests of them in the form of LiveCodeBench.

The sandbox runs a program once for each test and is told only the test's input.  What it must give is compared here, so
that a program cannot claim a test: it can only give what the test expects.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from typing import Literal

from megatron_tropd.flag_values import show
from megatron_tropd.grading.instructions import BadReference
from megatron_tropd.sandbox import Limits, run_python

LIMITS = Limits(cpu_s=6.0, wall_s=60.0)
"""Of one test: LiveCodeBench's 6 seconds, as CPU time, so that a verdict does not depend on the load of the machine."""
FORM = '[{"input": "3 5\\n", "output": "8\\n", "testtype": "stdin"}, ...]'
_FENCE = re.compile(r"^[ \t]*(`{3,}+)[ \t]*+([\w+#.-]*+)[^`\n]*+$", re.MULTILINE)
_PYTHON = ("python", "python3", "py")

_MODULES = [
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "builtins", "typing",
]  # fmt: skip
_PRELUDE = "".join(f"from {name} import *\n" for name in _MODULES)
_PRELUDE += f"import os, {', '.join(_MODULES)}\nsys.setrecursionlimit(50000)\n"
"""What LiveCodeBench puts before every program; its starter code uses these names."""
_RUN = 'exec(compile({program!a}, "program.py", "exec"), globals())\n'
_CALL = """\
def _call(name, load=json.loads, dump=json.dumps):
    arguments = [load(line) for line in sys.stdin.read().split("\\n") if line.strip()]
    results = os.fdopen(os.dup(1), "w")
    sys.stdin, sys.stdout = open(os.devnull), sys.stderr
    sys.modules["solution"] = sys.modules["__main__"]
    names = globals()
    names["__name__"] = "solution"
    names.pop(name, None)
    exec(compile({program!a}, "solution.py", "exec"), names)
    method = getattr(names["Solution"](), name, None) if "Solution" in names else None
    results.write(dump((method or names[name])(*arguments)))
    results.flush()
_call({name!a})
"""
"""Calls a function of the program, whose own prints go to stderr.  Like _RUN, it runs inside the sandbox only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramTest:
    """One test of a program."""

    kind: Literal["stdin", "functional"]
    input: str
    """What stdin holds, or one line of JSON for each argument of the function."""
    output: str
    """What stdout must hold, or the JSON of what the function must return."""
    function: str = ""
    """The function, or the method of the class ``Solution``; "" for stdin."""


def find_program(text: str) -> tuple[int, int] | None:
    """Return the place of the last fenced block of Python in ``text``, or else of the last one without a language.

    A block that is not closed is none: the response was cut off, or a fence is missing.
    """
    marked = plain = None
    for language, start, end in _blocks(text):
        if language.lower() in _PYTHON:
            marked = start, end
        elif not language:
            plain = start, end
    return marked or plain


def _blocks(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield language, start and end of every fenced block.  A fence as long without a language closes it."""
    opened: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opened is None:
            opened = fence
        elif not fence[2] and len(fence[1]) >= len(opened[1]):
            yield opened[2], min(opened.end() + 1, fence.start()), fence.start()
            opened = None


def read_tests(reference: str) -> list[ProgramTest]:
    """Return the tests of a reference.

    Raises:
        BadReference: it is not a list of tests, or a test cannot be passed by any program.
    """
    try:
        items = json.loads(reference)
    except (ValueError, RecursionError):
        raise BadReference(f"a list of tests is not JSON: {show(reference)}; expected {FORM}") from None
    if not isinstance(items, list) or not items:
        raise BadReference(f"tests are not a list with an entry: {show(reference)}; expected {FORM}")
    return [_test(item) for item in items]


def _test(item: object) -> ProgramTest:
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("input", "output", "testtype")):
        raise BadReference(f"a test is {show(json.dumps(item))}; expected texts input, output and testtype: {FORM}")
    kind, name = item["testtype"], item.get("func_name")
    if kind == "stdin":
        return ProgramTest(kind="stdin", input=item["input"], output=item["output"])
    if kind != "functional":
        raise BadReference(f"a testtype is {show(kind)}; expected stdin or functional")
    if not isinstance(name, str) or not name.isidentifier():
        raise BadReference(f"a functional test has the func_name {show(name)}; expected the name of a function")
    for key in ("input", "output"):
        lines = item[key].split("\n") if key == "input" else [item[key]]
        if any(_decoded(line) is None for line in lines if line.strip() or key == "output"):
            raise BadReference(f"the {key} of a functional test is {show(item[key])}; expected JSON")
    return ProgramTest(kind="functional", input=item["input"], output=item["output"], function=name)


def passes(program: str, tests: Sequence[ProgramTest], limits: Limits = LIMITS) -> bool:
    """Return whether ``program`` passes every test, each within ``limits``; the first that fails ends it.

    Raises:
        SandboxError: this machine cannot confine the program.
    """
    return all(_passes(program, test, limits) for test in tests)


def _passes(program: str, test: ProgramTest, limits: Limits) -> bool:
    template = _CALL if test.kind == "functional" else _RUN
    source = _PRELUDE + template.format(program=program, name=test.function)
    outcome = run_python(source, stdin=test.input, limits=limits)
    if outcome.verdict != "ok":
        return False
    if test.kind == "stdin":
        return same_output(outcome.stdout, test.output)
    found, expected = _decoded(outcome.stdout), _decoded(test.output)
    return found is not None and found == expected


def _decoded(text: str) -> tuple[object] | None:
    """Return the value of a JSON text in a tuple; None if it is no JSON."""
    try:
        return (json.loads(text),)
    except (ValueError, RecursionError):  # ValueError: also an integer of more digits than Python reads
        return None


def same_output(found: str, expected: str) -> bool:
    """Return whether two outputs agree line by line: as text without whitespace at its ends, or number by number."""
    lines, wanted = found.strip().split("\n"), expected.strip().split("\n")
    return len(lines) == len(wanted) and all(map(_same_line, lines, wanted))


def _same_line(found: str, expected: str) -> bool:
    if found.strip() == expected.strip():
        return True
    words, wanted = found.split(), expected.split()
    try:
        return len(words) == len(wanted) and all(Decimal(a) == Decimal(b) for a, b in zip(words, wanted, strict=True))
    except DecimalException:  # a word that is no number
        return False
