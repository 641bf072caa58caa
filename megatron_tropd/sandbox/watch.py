"""Watches a confined process: reads what it writes, holds it to its limits, ends it."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field

from megatron_tropd.sandbox import directory
from megatron_tropd.sandbox.outcome import Limits, Verdict

_TICK_S = 0.02
"""How often the process is looked at while it writes nothing."""
_CLOSED_TICK_S = 0.002
"""The same after both pipes are closed, when it has most likely ended."""
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a process ended."""

    exit_code: int | None
    """None if a signal ended it."""
    signal: int
    """0 if none did."""
    reason: tuple[Verdict, str] | None
    """The limit for which it was ended, and what it did; None if it ended otherwise."""
    wall_s: float
    cpu_s: float


@dataclass(slots=True, kw_only=True)
class Watch:
    """A process that leads a session of its own, and what has been read from it."""

    process: subprocess.Popen[bytes]
    place: str
    """The directory that it may write in."""
    limits: Limits
    start: float = field(default_factory=time.monotonic)
    output: dict[str, bytearray] = field(default_factory=lambda: {"stdout": bytearray(), "stderr": bytearray()})

    def until_end(self) -> End:
        """Return when the process has ended and is reaped; end it where it breaks a limit.

        Raises ChildProcessError if other code of this process has reaped it, so that nothing is known of its end.
        """
        reason: tuple[Verdict, str] | None = None
        looked = self.start
        with selectors.DefaultSelector() as selector:
            for name, pipe in (("stdout", self.process.stdout), ("stderr", self.process.stderr)):
                assert pipe is not None
                os.set_blocking(pipe.fileno(), False)
                selector.register(pipe, selectors.EVENT_READ, name)
            while reason is None and not self._too_much() and self._ended() is None:
                for key, _ in selector.select(_TICK_S if selector.get_map() else 0):
                    if not self._read(key):
                        selector.unregister(key.fileobj)
                if not selector.get_map():
                    time.sleep(_CLOSED_TICK_S)
                if time.monotonic() - looked >= _TICK_S:
                    looked = time.monotonic()
                    reason = self._excess()
            result = self._kill()
            for key in list(selector.get_map().values()):
                while not self._too_much() and self._read(key):
                    pass
        if reason is None and self._too_much():
            reason = "output", f"more than {self.limits.output_bytes} bytes of output"
        return self._reap(result, reason)

    def stop(self) -> None:
        """End the process, if it has not been reaped, and close its pipes."""
        if self.process.returncode is None:
            with contextlib.suppress(ChildProcessError):
                self._ended()  # raises where others have reaped it: its id may be another's by now
                self._kill()
            self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    def _ended(self) -> os.waitid_result | None:
        """Return how the process ended, which stays a zombie, so that its id stays its own; None while it runs."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def _too_much(self) -> bool:
        return sum(map(len, self.output.values())) > self.limits.output_bytes

    def _read(self, key: selectors.SelectorKey) -> bool:
        """Read what is there; return whether more may come."""
        try:
            chunk = os.read(key.fd, _CHUNK_BYTES)
        except BlockingIOError:
            return False
        self.output[key.data] += chunk
        return bool(chunk)

    def _cpu_s(self) -> float:
        """Return the CPU time of all threads of the process, also of a zombie (clock ids: clock_getcpuclockid(3))."""
        try:
            return time.clock_gettime((~self.process.pid << 3) | 2)
        except OSError as error:
            raise ChildProcessError("the process is gone") from error

    def _excess(self) -> tuple[Verdict, str] | None:
        limits = self.limits
        if self._cpu_s() > limits.cpu_s:
            return "timeout", f"more than {limits.cpu_s:g} s of CPU time"
        if time.monotonic() - self.start > limits.wall_s:
            return "timeout", f"more than {limits.wall_s:g} s"
        if self._num_threads() > limits.threads:
            return "forbidden", f"more than {limits.threads} threads"
        if excess := directory.excess(self.place, file_bytes=limits.file_bytes, files=limits.files):
            return "output", excess
        return None

    def _num_threads(self) -> int:
        try:
            return os.stat(f"/proc/{self.process.pid}/task").st_nlink - 2  # a directory for each
        except OSError:  # it has ended, or there is no /proc, which check() reports
            return 0

    def _kill(self) -> os.waitid_result:
        """End the session of the process, or what is left of it, and wait for the process, which stays a zombie."""
        os.killpg(self.process.pid, signal.SIGKILL)
        result = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        assert result is not None  # only WNOHANG returns None
        return result

    def _reap(self, result: os.waitid_result, reason: tuple[Verdict, str] | None) -> End:
        cpu_s = self._cpu_s()
        self.process.wait()
        exited = result.si_code == os.CLD_EXITED
        return End(
            exit_code=result.si_status if exited else None,
            signal=0 if exited else result.si_status,
            reason=reason,
            wall_s=time.monotonic() - self.start,
            cpu_s=cpu_s,
        )
