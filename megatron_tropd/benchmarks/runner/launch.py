"""Runs a job of benchmarks in evalscope's environment.  This file is a program, which ``benchmarks/job.py`` starts.

Standard input carries the job as one JSON line, keys included, and then stays open: when it closes, the command is
gone, however it ended, and this process ends with its group.  Standard output carries one JSON object a line:
``progress``, ``scores``, and at last ``error`` or ``done``.  All else that evalscope prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

EXIT_FAILED = 1


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _first_line() -> bytes:
    """Read the first line of standard input, unbuffered, so that nothing after it is taken from the watch thread."""
    line = bytearray()
    while not line.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            raise SystemExit("launch.py: standard input closed before the job arrived")
        line += piece
    return bytes(line)


def main() -> int:
    """Run the job and return the exit code."""
    job: dict[str, Any] = json.loads(_first_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def tell(**message: Any) -> None:
        with lock:
            answers.write(json.dumps(message) + "\n")
            answers.flush()

    sys.path.append(str(Path(__file__).resolve().parents[3]))
    try:
        from megatron_tropd.benchmarks.runner.evaluate import run

        run(job, tell)
    except Exception as error:
        traceback.print_exc()
        tell(kind="error", text=f"{type(error).__name__}: {error}")
        return EXIT_FAILED
    tell(kind="done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
