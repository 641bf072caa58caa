"""Run programs that come as JSON, one a line: ``python -m megatron_tropd.sandbox < requests.jsonl``.

A request has ``source`` and may have ``stdin``, ``limits`` (an object of the fields of Limits), ``python``,
``site_packages`` and an ``id`` of any kind.  Its answer is a line with the ``id`` and the fields of Outcome, or with
``error`` if it was not run.  Answers come as they are ready.  Exit codes: 0 all were run, 1 some were not, 2 a flag is
wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from megatron_tropd.sandbox import Limits, run_python


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def parser() -> argparse.ArgumentParser:
    """Return the command-line parser of this command."""
    flags = argparse.ArgumentParser(  # no FlagParser: a copy of this folder alone works
        prog="python -m megatron_tropd.sandbox",
        allow_abbrev=False,
        description="Run the programs of JSON lines on stdin, each in a sandbox; print an outcome a line.",
    )
    flags.add_argument(
        "--workers", type=_positive, default=os.cpu_count() or 1, metavar="N", help="programs at a time (default: CPUs)"
    )
    flags.add_argument(
        "--allow-weaker", action="store_true", help="run them also where this machine cannot confine them"
    )
    return flags


def answer(line: bytes, allow_weaker: bool) -> dict[str, Any]:
    """Return the answer to one request."""
    request: Any = None
    try:
        request = json.loads(line)
        arguments = {name: value for name, value in request.items() if name != "id"}
        limits = Limits(**arguments.pop("limits", {}))
        outcome = run_python(**arguments, limits=limits, allow_weaker=allow_weaker)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # RuntimeError: SandboxError, JSON too deep
        result = {"error": str(error)}
    else:
        result = dataclasses.asdict(outcome)
    return ({"id": request["id"]} if isinstance(request, dict) and "id" in request else {}) | result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parser().parse_args(argv)
    failed = False
    writing = threading.Lock()

    def show(done: Future[dict[str, Any]]) -> None:
        nonlocal failed
        with writing:
            failed |= "error" in done.result()
            try:
                print(json.dumps(done.result()), flush=True)
            except OSError as error:  # said once: the stream is silent from then on, also when Python flushes it
                failed = True
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)

    with ThreadPoolExecutor(args.workers) as pool:
        for line in sys.stdin.buffer:
            pool.submit(answer, line, args.allow_weaker).add_done_callback(show)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
