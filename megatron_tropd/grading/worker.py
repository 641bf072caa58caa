"""The process that does what may take for ever, one JSON line in, one JSON line out; ``workers.py`` starts it.

The argument is how many seconds of CPU time each question may take; then the kernel ends the process, whatever it is
doing.  It is CPU time and not wall-clock time, so that a verdict does not depend on the load of the machine.  No alarm
signal is used: it does not interrupt a regular expression or the arithmetic of long numbers.

A question is ``[task, arguments...]``.  The reply is ``{"result": ...}``, or ``{"error": ...}`` if the task failed for
another reason than its limits.

This module and what it imports need no torch, so that the process starts in a moment.
"""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MEMORY_BYTES = 4 << 30
"""Of address space; what needs more is a MemoryError, and has no result."""

Task = Callable[..., Any]


def main() -> None:
    """Answer every line of standard input, until it is closed."""
    cpu_seconds = float(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the trainer decides what it means
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    replies = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    print("ready", file=replies, flush=True)
    for stream in (1, 2):  # parsers print their complaints about every answer
        os.dup2(nowhere, stream)
    for line in sys.stdin:
        print(json.dumps(_reply(cpu_seconds, *json.loads(line))), file=replies, flush=True)


def _reply(cpu_seconds: float, name: str, *arguments: Any) -> dict[str, Any]:
    try:
        task = _task(name)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        return {"result": task(*arguments)}
    except (MemoryError, RecursionError):
        return {"result": None}
    except Exception as error:  # of any kind: whoever asked raises it
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


@functools.cache
def _task(name: str) -> Task:
    """Return the function of a task, after all that it needs was imported: that is not limited."""
    return {"find": _find, "equal": _equal, "follow": _follow}[name]()


def _find() -> Task:
    """Task (text, pattern) -> (start, end) of group 1 in the last match; None without one."""
    from megatron_tropd.grading.answers import last_match

    return lambda text, pattern: last_match(text, re.compile(pattern))


def _follow() -> Task:
    """Task (text, constraints, lenient) -> whether the text follows all of them."""
    from megatron_tropd.grading.constraints import load_languages
    from megatron_tropd.grading.instructions import follows, read_constraints

    load_languages()
    return lambda text, constraints, lenient: follows(text, read_constraints(constraints), lenient=lenient)


def _equal() -> Task:
    """Task (answer, reference) -> whether math-verify finds them equal."""
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def read(text: str) -> list[Any]:  # without the timeouts of math-verify, which are alarm signals
        return parse(f"\\boxed{{{text}}}", targets, parsing_timeout=None)

    def equal(answer: str, reference: str) -> bool:
        try:
            return bool(verify(read(reference), read(answer), timeout_seconds=None))
        except Exception:  # of any kind: the answer is whatever a model wrote
            return False

    equal(r"\frac{1}{2}", "0.5")  # loads the grammar
    return equal


if __name__ == "__main__":
    main()
