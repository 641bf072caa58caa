"""What a run of a program may use, and what is known after it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

MIB = 1 << 20

Verdict = Literal["ok", "error", "timeout", "memory", "output", "forbidden", "killed"]
"""How a program ended.

* ok         by itself, with exit code 0
* error      by itself, with another exit code, which is also that of an exception
* timeout    it used more than ``cpu_s`` or lasted longer than ``wall_s``
* memory     with MemoryError
* output     it wrote more than ``output_bytes``, ``file_bytes`` or ``files``
* forbidden  with PermissionError, or by a system call that is fatal, or it had more than ``threads``
* killed     by a signal that none of these explains, such as SIGSEGV after an overflow of the C stack
"""


class SandboxError(RuntimeError):
    """The program was not run: this machine cannot confine it, or its interpreter does not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one run may use.  Raises ValueError for a limit that is not positive, or a count that is not an integer."""

    cpu_s: float = 6.0
    """Seconds of CPU time, of all threads together.  This is what ends an endless loop, on a loaded machine too."""
    wall_s: float = 30.0
    """Seconds from the start to the end.  It ends what waits, so it may be generous."""
    memory_bytes: int = 1024 * MIB
    """Address space: what is mapped, whether it is used or not, with the interpreter's 30 MiB.  At least 64 MiB."""
    threads: int = 64
    """Threads at one time.  Other processes cannot be started at all."""
    file_bytes: int = 16 * MIB
    """Bytes of all files in the directory of the program together."""
    files: int = 256
    """Files and directories there."""
    output_bytes: int = 8 * MIB
    """Bytes of stdout and stderr together."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds, kind = ((int, float), "a finite number") if field.name.endswith("_s") else ((int,), "an integer")
            if not isinstance(value, kinds) or not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Limits.{field.name} is {value!r}; expected {kind} above 0")
        if self.memory_bytes < 64 * MIB:
            raise ValueError(f"Limits.memory_bytes is {self.memory_bytes}; Python needs at least {64 * MIB}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a program ended, and what it wrote."""

    verdict: Verdict
    exit_code: int | None
    """None if a signal ended it, also one of the sandbox."""
    stdout: str
    """UTF-8; bytes that are not are replaced by U+FFFD.  No longer than ``output_bytes``."""
    stderr: str
    wall_s: float
    """Seconds from the start to the end."""
    detail: str
    """Why the verdict is not ok, in one line; empty if it is."""
