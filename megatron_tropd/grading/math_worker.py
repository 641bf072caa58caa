"""Compare answers with math-verify, one JSON line in, one JSON line out; ``math_process.py`` starts this file.

It is a script and not a module of the package, so that its process starts without torch.  Each comparison may take
CPU_SECONDS of CPU time; then the kernel ends the process, whatever it is doing.  It is CPU time and not wall-clock
time, so that a verdict does not depend on the load of the machine.  The timeouts of math-verify itself are off: they
are alarm signals, which do not interrupt the arithmetic of long numbers.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import Any

CPU_SECONDS = 3.0
MEMORY_BYTES = 4 << 30
"""Of address space; a larger number is a MemoryError, and two answers that cannot be compared are not equal."""


def main() -> None:
    """Answer every line of standard input: [answer, reference] -> true or false."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the trainer decides what it means
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    compare = _load()
    compare(r"\frac{1}{2}", "0.5")  # loads the grammar
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    replies = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    print("ready", file=replies, flush=True)
    for stream in (1, 2):  # the parser prints its complaints about every answer
        os.dup2(nowhere, stream)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        equal = compare(answer, reference)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), file=replies, flush=True)


def _limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _load() -> Any:
    """Return a function that tells whether two answers are equal, and raises nothing."""
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def read(text: str) -> list[Any]:
        return parse(f"\\boxed{{{text}}}", targets, parsing_timeout=None)

    def compare(answer: str, reference: str) -> bool:
        try:
            return bool(verify(read(reference), read(answer), timeout_seconds=None))
        except Exception:  # of any kind: the answer is whatever a model wrote
            return False

    return compare


if __name__ == "__main__":
    main()
