"""Runs the program that is its first argument, and then prints how many threads of gloo's outlive it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def num_threads() -> int:
    """Of gloo: one of a group's connections, and those that carry out its collectives."""
    return sum("gloo" in _name(task) for task in Path("/proc/self/task").iterdir())


def _name(task: Path) -> str:
    """Name of a thread; "" of one that ended since it was listed."""
    try:
        return (task / "comm").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def main() -> None:
    """As Python runs a file."""
    sys.argv.pop(0)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    print(f"threads of gloo: {num_threads()}\n", end="", flush=True)


if __name__ == "__main__":
    main()
