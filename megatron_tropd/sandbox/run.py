"""Runs a program in the sandbox."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tropd.sandbox import directory, landlock
from megatron_tropd.sandbox.machine import Machine, this_machine
from megatron_tropd.sandbox.outcome import Limits, Outcome, SandboxError, Verdict
from megatron_tropd.sandbox.watch import End, Watch

_LAUNCHER = Path(__file__).with_name("inside") / "launcher.py"
_OPEN_FILES, _SIGNALS, _STACK_BYTES = 64, 1024, 64 << 20
_DETAIL_LENGTH = 300
_KERNEL_GRACE_S = 1
"""The kernel's own limit of CPU time is this much later than that of the watch, in case the watch gets no CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A program to run: the arguments of ``run_python``, which says what they are."""

    source: str
    stdin: str = ""
    limits: Limits = field(default_factory=Limits)
    python: str = sys.executable
    site_packages: Sequence[str] = ()
    allow_weaker: bool = False


def run_python(
    source: str,
    *,
    stdin: str = "",
    limits: Limits | None = None,
    python: str = sys.executable,
    site_packages: Sequence[str] = (),
    allow_weaker: bool = False,
) -> Outcome:
    """Run a Python program in a process of its own that has its limits and nothing else of this machine.

    ``stdin``: what the program reads, as UTF-8.  ``python``: the interpreter, 3.10 or newer; its standard library can
    be imported, and modules in the directories ``site_packages``, which the program can read.  Nothing of the
    environment reaches the program, and its hash seed is 0, so a program that asks for no time and no random number
    does the same every time.

    Whatever the program does is an Outcome.  Raises SandboxError if it was not run: if the machine lacks something of
    ``check()`` (``allow_weaker``: it is then run with what there is, which is no protection against a hostile program),
    if ``python`` does not start, if a directory is not there, or if the temporary directory cannot be written.  Safe to
    call from several threads.
    """
    return _run_request(
        Request(
            source=source,
            stdin=stdin,
            limits=limits or Limits(),
            python=python,
            site_packages=site_packages,
            allow_weaker=allow_weaker,
        )
    )


def run_many(requests: Sequence[Request], *, workers: int) -> list[Outcome]:
    """Return the outcome of each request, in order; ``workers`` of them run at a time."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(_run_request, requests))


def _run_request(request: Request) -> Outcome:
    machine = this_machine()
    if machine.missing and not (request.allow_weaker and machine.linux):
        raise SandboxError(
            "this machine cannot confine a generated program, so none is run.  "
            + "  ".join(machine.missing)
            + "  allow_weaker=True runs it on Linux all the same; it is for programs that need no sandbox."
        )
    interpreter = shutil.which(request.python)
    if interpreter is None:
        raise SandboxError(f"the interpreter {request.python} is not a program; python= names one")
    for path in request.site_packages:
        if not os.path.isdir(path):
            raise SandboxError(f"{path} of site_packages= is not a directory")
    try:
        with _fresh_directory() as place:
            return _run(request, os.path.abspath(interpreter), machine, place)
    except ChildProcessError as error:
        raise SandboxError(
            "how the program ended is not known, because this process ignores SIGCHLD or waits for all its children"
        ) from error
    except OSError as error:
        raise SandboxError(f"the program could not be run: {error}") from error


@contextlib.contextmanager
def _fresh_directory() -> Iterator[str]:
    place = os.path.realpath(tempfile.mkdtemp(prefix="tropd-sandbox-"))
    try:
        yield place
    finally:
        directory.remove(place)


def _environment(work: str) -> dict[str, str]:
    environ = {
        "HOME": work,
        "TMPDIR": work,
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",  # numpy's libraries take a thread for each processor otherwise
        "OPENBLAS_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",  # each arena takes 64 MiB of the address space
    }
    if libraries := os.environ.get("LD_LIBRARY_PATH"):  # some interpreters do not start without it
        environ["LD_LIBRARY_PATH"] = libraries
    return environ


def _rlimits(limits: Limits, machine: Machine) -> str:
    values = {
        "CPU": (math.ceil(limits.cpu_s) + _KERNEL_GRACE_S,) * 2,  # SIGKILL; a softer limit's SIGXCPU may be ignored
        "AS": (limits.memory_bytes,) * 2,
        "FSIZE": (limits.file_bytes,) * 2,
        "STACK": (_STACK_BYTES,) * 2,
        "NOFILE": (_OPEN_FILES,) * 2,
        "SIGPENDING": (_SIGNALS,) * 2,
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
    }
    if not machine.calls:  # what there is without a filter: no processes, but no threads either, and not for root
        values["NPROC"] = (0, 0)
    return ",".join(f"{name}={soft}:{hard}" for name, (soft, hard) in values.items())


def _run(request: Request, python: str, machine: Machine, place: str) -> Outcome:
    limits = request.limits
    program, typed, work = Path(place, "main.py"), Path(place, "stdin"), Path(place, "work")
    program.write_bytes(request.source.encode("utf-8", "surrogatepass"))
    typed.write_bytes(request.stdin.encode("utf-8", "surrogatepass"))
    work.mkdir()
    said, saying = os.pipe()
    os.set_blocking(said, False)  # another thread's child may have the other end open
    abi = machine.landlock_abi
    arguments = [
        saying, program, os.getpid(), _rlimits(limits, machine), machine.calls.hex(),
        landlock.ruleset(abi).hex() if abi else "", landlock.restrict_flags(abi), landlock.OWN_DIRECTORY, landlock.READ,
        typed,  # for programs that open /dev/stdin
        *(f"+{os.path.abspath(path)}" for path in request.site_packages),
    ]  # fmt: skip
    try:
        with typed.open("rb") as stdin:
            process = subprocess.Popen(
                [python, "-s", "-S", "-B", str(_LAUNCHER), *map(str, arguments)],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=work,
                env=_environment(str(work)),
                pass_fds=(saying,),
                start_new_session=True,
            )
    except OSError:
        os.close(said)
        raise
    finally:
        os.close(saying)
    watch = Watch(process=process, place=str(work), limits=limits)
    try:
        end = watch.until_end()
        message = _last_words(said)
    finally:
        watch.stop()
        os.close(said)
    stdout, stderr = (
        bytes(watch.output[name][: limits.output_bytes]).decode(errors="replace") for name in watch.output
    )
    if message != "ready" and end.reason is None:
        raise SandboxError(f"the interpreter {python} could not be confined: {message or stderr.strip() or end}")
    verdict, detail = _verdict(end, stderr, limits)
    return Outcome(
        verdict=verdict,
        exit_code=end.exit_code,
        stdout=stdout,
        stderr=stderr,
        wall_s=end.wall_s,
        detail=detail[:_DETAIL_LENGTH],
    )


def _last_words(said: int) -> str:
    """Return what the launcher has said, which has ended; empty if it said nothing."""
    try:
        return os.read(said, 4096).decode(errors="replace")
    except BlockingIOError:
        return ""


_TELLING_ERRORS: dict[str, Verdict] = {"MemoryError": "memory", "PermissionError": "forbidden"}


def _verdict(end: End, stderr: str, limits: Limits) -> tuple[Verdict, str]:
    if end.reason is not None:
        return end.reason
    if end.exit_code == 0:
        return "ok", ""
    if end.exit_code is not None:
        last = stderr.strip().rpartition("\n")[2]
        return _TELLING_ERRORS.get(last.partition(":")[0], "error"), last or f"exit code {end.exit_code}"
    if end.cpu_s > limits.cpu_s:
        return "timeout", f"more than {limits.cpu_s:g} s of CPU time"
    text = f"signal {end.signal} ({signal.strsignal(end.signal)})"
    return ("forbidden" if end.signal == signal.SIGSYS else "killed"), text
