"""A disk that fails on purpose, for real writers in C, C++, Rust and Python: ``failing_disk.c``, preloaded.

A test gives work to a process of its own in which the library is loaded (:class:`FailingDisk`), because it must be there
when a process starts.  Jobs and pools of ranks that this process starts have it too.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = Path(__file__).with_suffix(".c")
NAME = "FAILING_DISK"
ANSWER_S = 240.0


def rule(pattern: str, calls: str, error: int, *, first: int = 1, count: int = 0, rank: int = -1) -> str:
    """Let ``calls`` (with commas between them) on paths that match ``pattern`` fail with ``error``, from the matching
    call number ``first`` on, ``count`` times (0: from then on always), on one local rank or (-1) in every process."""
    return f"{pattern} {calls} {error} {first} {count} {rank}"


@contextlib.contextmanager
def failing(*rules: str) -> Iterator[Callable[[], int]]:
    """Have the disk fail in this process, which must be a :class:`FailingDisk` or started by one; gives what counts
    the calls that failed."""
    library = ctypes.CDLL(None)
    library.failing_disk_failures.restype = ctypes.c_long
    library.failing_disk_rules("\n".join(rules).encode())
    try:
        yield lambda: int(library.failing_disk_failures())
    finally:
        library.failing_disk_rules(b"")


def compile_library(folder: Path) -> tuple[Path | None, str]:
    """The library, or why there is none."""
    compiler = next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), ""
    )
    if not (compiler and sys.platform == "linux"):
        return None, "a disk that fails on purpose needs Linux and a C compiler"
    library = folder / "failing_disk.so"
    words = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        return None, f"failing_disk.c cannot be compiled: {done.stderr[-500:]}"
    probe = "import ctypes; ctypes.CDLL(None).failing_disk_rules(b'')"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], env=_with(library), capture_output=True, timeout=120, check=False
    )
    return (library, "") if loaded.returncode == 0 else (None, "a library cannot be preloaded here")


def _with(library: Path) -> dict[str, str]:
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


class FailingDisk:
    """A process with the library, and a world of one rank, that runs what a test gives it."""

    def __init__(self, library: Path) -> None:
        self.environment = _with(library)
        self._pipe, theirs = mp.Pipe()
        words = [sys.executable, "-W", "ignore", "-m", "tests.failing_disk", str(theirs.fileno())]
        self._process = subprocess.Popen(words, env=self.environment, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function``, of module level, there; its result."""
        self._pipe.send((function, args, kwargs))
        if not self._pipe.poll(ANSWER_S):
            self._process.kill()
            raise TimeoutError(f"{function.__name__} did not answer within {ANSWER_S:.0f} s")
        good, result = self._pipe.recv()
        if not good:
            raise AssertionError(result)
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()


def main() -> None:
    from tests.ranks import free_port, serve

    serve(0, 1, free_port(), Connection(int(sys.argv[1])))


if __name__ == "__main__":
    from tests.failing_disk import main as imported  # as pickles name it

    imported()
