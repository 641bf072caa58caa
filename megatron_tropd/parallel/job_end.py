"""Report how a job ends: the cause, once on each node, and an exit code.

A job of many ranks ends because of one of them, and all others then see consequences: torchrun sends them a signal, or
a connection breaks.  :class:`JobEnd` tells causes from consequences.  A rank reports a cause before it ends, so the
ranks of its node print nothing more.  On a node that sees only consequences, one rank prints the first of them.

A command that can save itself does so on a signal before it ends (:meth:`JobEnd.saving_first`).

Imports neither torch nor Megatron, so that a command can use it before it imports them.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megatron_tropd.parallel.print_once import Importance, print_once
from megatron_tropd.parallel.stop_request import StopRequest
from megatron_tropd.parallel.torchrun import has_lost_a_rank
from megatron_tropd.standard_streams import open_closed

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""The signals that torchrun, when it gets one, sends on to its ranks; and SIGUSR1, a scheduler's before a limit."""
_AT_ONCE = (signal.SIGQUIT,)
"""Ends a rank at once, also one that could save itself first."""
EXIT_FAILED = 1
_PACKAGES = ("megatron_tropd", "checkpoint_convert")
_GRACE_S = 5.0
"""How long after a signal the main thread may take to report it; torchrun kills a rank after 30 s."""

_SAME_S = 3.0
"""Signals that come so soon after the first are copies of it: a terminal and a scheduler send one to the ranks and to
torchrun, which sends it on."""
_AGAIN_S = 0.1
_NO_SIGNAL = 0
"""Ends the thread that waits for signals."""


class Terminated(BaseException):
    """A signal ends this rank: torchrun sends it when another rank failed, a scheduler when it takes the machine back.

    Not an Exception: code that handles any Exception and goes on, as fail_together does, must not handle this one.
    """

    def __init__(self, number: int, why: str = "") -> None:
        super().__init__(f"ended by {signal.Signals(number).name}{why and ', '}{why}")
        self.number, self.explained = number, bool(why)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What a command says of an error that ends it."""

    text: str
    exit_code: int
    summary: str
    """A few words for the summary that torchrun prints after ``text``."""


def is_consequence(error: BaseException) -> bool:
    """Return whether ``error`` only says that the job ends: a signal, or a lost or silent rank.

    NCCL's errors and torch's store have a type of their own; gloo's are RuntimeErrors that name gloo's source file.
    """
    if isinstance(error, Terminated):
        return True
    torch_error = getattr(sys.modules.get("torch.distributed"), "DistError", None)
    if torch_error is not None and isinstance(error, torch_error):
        return True
    return type(error) is RuntimeError and re.search(r"\bgloo\b", str(error), re.IGNORECASE) is not None


def explains_itself(error: BaseException) -> bool:
    """Return whether the text of ``error`` was written for the user: our code raised it, as an error of ours or as a
    ValueError, an OSError or a RuntimeError."""
    return _is_ours(error) or (isinstance(error, (ValueError, OSError, RuntimeError)) and _innermost(error) is not None)


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _PACKAGES


def _innermost(error: BaseException) -> traceback.FrameSummary | None:
    """Return the place in our code where ``error`` was raised; None if it was raised elsewhere."""
    frame, last = error.__traceback__, None
    while frame is not None:
        frame, last = frame.tb_next, frame
    if last is None or last.tb_frame.f_globals.get("__name__", "").split(".")[0] not in _PACKAGES:
        return None
    return traceback.extract_tb(last)[-1]


def describe(error: BaseException) -> str:
    """Return the text for an error.  An error of ours, which often is the error of all ranks, is its text; to another
    error with a text for the user come the rank and the place; an unexpected error has its traceback."""
    who = f"rank {os.environ.get('RANK', '0')}"
    if isinstance(error, Terminated):
        if error.explained:
            return f"{who}: {error}"
        return f"{who}: {error}; torchrun sends a signal to its ranks when it gets one, or when another rank has ended"
    if is_consequence(error):
        return f"{who}: communication with the other ranks failed, as it does when one of them is lost: {error}"
    if not explains_itself(error):
        return f"{who} failed:\n{''.join(traceback.format_exception(error)).rstrip()}"
    what = f"{type(error).__name__}: {error}"
    if _is_ours(error) or (place := _innermost(error)) is None:
        return what
    return f"{who}: {what}\n({place.filename}:{place.lineno}, {place.name})"


@dataclass(slots=True, kw_only=True)
class _Saving:
    """A command that saves itself on a signal.  Only the thread that waits for signals changes this."""

    stop: StopRequest
    grace_s: float
    first: tuple[int, float] | None = None
    """The signal that asked for the stop, and when it came."""

    def seconds_left(self) -> float | None:
        """Return how long the command may still take; None before a signal came."""
        return None if self.first is None else max(self.first[1] + self.grace_s - time.monotonic(), 0.0)


class JobEnd:
    """Runs a command, and reports its end if that is an error or a signal.

    Meanwhile signals raise :class:`Terminated` in the main thread.  Python can raise it only between two of its own
    instructions, and a rank that waits in a collective for a lost rank, or for the GPU, may never reach the next.  So a
    thread waits for signals too, and reports one that the main thread has not reported in time.  The same thread judges
    what a signal means while the command can save itself first.

    Args:
        end_of: returns what to say of an error.  Called from either thread.
    """

    def __init__(self, end_of: Callable[[BaseException], End]) -> None:
        self._end_of = end_of
        self._reported: tuple[Importance, int] | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._before: dict[signal.Signals, Any] = {}
        self._saving: _Saving | None = None
        self._final: Terminated | None = None
        """Set by the thread before it has the main thread raise it."""

    @contextlib.contextmanager
    def saving_first(self, stop: StopRequest, grace_s: float) -> Iterator[None]:
        """Until this context is left, a signal does not end the command: it asks for ``stop``, and the command saves.

        It ends at once, by :class:`Terminated`, when it has not left the context ``grace_s`` seconds after the signal,
        at a second signal (or SIGQUIT), and when torchrun sends the signal because it has lost a rank, without which
        nothing can be saved.
        """
        self._saving = _Saving(stop=stop, grace_s=grace_s)
        try:
            yield
        finally:
            self._saving = None

    def _install(self) -> None:
        if not faulthandler.is_enabled():
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # standard error is no file
                faulthandler.enable()
        read, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, args=(read,), name="job-end", daemon=True)
        self._watcher.start()
        os.register_at_fork(after_in_child=self._restore)  # a signal for a forked worker is not one for this process
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._on_signal)

    def _uninstall(self) -> None:
        with self._lock:
            self._done.set()
            self._restore()
        os.write(self._wakeup, bytes([_NO_SIGNAL]))
        self._watcher.join()
        os.close(self._wakeup)

    def _restore(self) -> None:
        """Handle signals as before; does nothing the second time."""
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
        while self._before:
            signal.signal(*self._before.popitem())

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._saving is not None and self._final is None:
            return  # the other thread judges it
        self._ignore_signals()  # clean up undisturbed; whoever sent the signal can still kill
        raise self._final or Terminated(number)

    def _ignore_signals(self) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def _watch(self, read: int) -> None:
        with open(read, "rb", buffering=0) as signals:
            while True:
                saving = self._judged()
                arrived = bool(select.select([signals], [], [], saving.seconds_left() if saving else None)[0])
                number = signals.read(1)[0] if arrived else 0
                if arrived and number == _NO_SIGNAL:
                    return
                if (saving := self._judged()) is not None:  # which may have begun, or ended, meanwhile
                    if end := self._judge(number, saving):
                        self._end_now(end)
                elif number in SIGNALS and not self._done.wait(_GRACE_S):
                    self.report(self._final or Terminated(number))

    def _judged(self) -> _Saving | None:
        """Return the command that saves itself, as long as it is not to end at once."""
        return None if self._final or self._done.is_set() else self._saving

    def _judge(self, number: int, saving: _Saving) -> Terminated | None:
        """Ask for a stop because of signal ``number``, or return what ends the command; 0: no signal came in time."""
        if saving.seconds_left() == 0.0:
            assert saving.first is not None
            return Terminated(saving.first[0], f"and not saved within --grace-period {saving.grace_s:g} s")
        if number not in SIGNALS:
            return None
        name = signal.Signals(number).name
        if has_lost_a_rank():
            return Terminated(number)
        if number in _AT_ONCE:
            return Terminated(number, "which does not wait for a save")
        if saving.first is None:
            saving.first = number, time.monotonic()
            if saving.stop.ask(name):
                print_once(f"{name}: the run saves, then ends; at most {saving.grace_s:g} s", Importance.NOTE)
        elif time.monotonic() - saving.first[1] > _SAME_S:
            return Terminated(number, "the second signal")
        return None

    def _end_now(self, end: Terminated) -> None:
        """Raise ``end`` in the main thread, or report it here.

        A signal that comes just before a system call does not end the call, so it is sent until it has an effect.
        """
        self._final = end
        deadline = time.monotonic() + _GRACE_S
        while not self._done.is_set() and time.monotonic() < deadline:
            self._interrupt(end.number)
            self._done.wait(_AGAIN_S)
        if not self._done.is_set():
            self.report(end)

    def _interrupt(self, number: int) -> None:
        """Send a signal to the main thread, unless signals are handled as before again: it would end the process."""
        main = threading.main_thread().ident
        assert main is not None, "it runs"
        with self._lock:
            if not self._done.is_set():
                signal.pthread_kill(main, number)

    def run(self, command: Callable[[], int]) -> int:
        """Run ``command`` and return its exit code, or that of the error that ended it, after reporting the error."""
        open_closed()
        try:
            self._install()
            try:
                exit_code = command()
                self._ignore_signals()
                return exit_code
            except (Exception, Terminated) as error:
                return self.report(error)
        except Terminated as error:  # it came before the command, or just when an error was to be reported; only once
            return self.report(error.__context__ or error)
        finally:
            self._uninstall()

    def report(self, error: BaseException) -> int:
        """Print what ended this rank, unless its node has printed as important an end, and return the exit code.

        Call this before anything by which other ranks notice that this one ends.  Reporting the same error again has no
        effect.
        """
        if threading.current_thread() is threading.main_thread():
            self._ignore_signals()
        importance = Importance.CONSEQUENCE if is_consequence(error) else Importance.CAUSE
        with self._lock:
            if self._reported is None or importance > self._reported[0]:
                end = self._end_of(error)
                print_once(end.text, importance)
                _tell_torchrun(end, importance)
                self._reported = importance, end.exit_code
            self._done.set()
            return self._reported[1]


def _tell_torchrun(end: End, importance: Importance) -> None:
    """Write the error file of this rank, which torchrun reads for its summary.

    torchrun prints ``py_callstack`` there, and hands the whole file to a scheduler that asks for it.  Without the file
    the summary tells the user to change the code.  The earliest failure is shown as the root cause.  Times are whole
    seconds, and a killed rank has the time at which torchrun saw it, so the time of a consequence is rounded up.
    """
    if not (path := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        return
    shown = f"{end.summary}; see the message above, which is printed once on each node"
    seconds = math.floor(time.time()) if importance == Importance.CAUSE else math.ceil(time.time())
    extra = {"py_callstack": shown, "timestamp": str(seconds)}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": end.text, "extraInfo": extra}}, file)
