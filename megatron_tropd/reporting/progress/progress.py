"""Shows the progress of a run on the terminal.

Rank 0 makes a :class:`Progress`: a live panel on a terminal, plain lines in Megatron's style everywhere
else (a pipe, ``NO_COLOR``, ``TERM=dumb``).  All other ranks make a :class:`NullProgress`, which only
measures seconds and knows what the rank does.  With a run directory rank 0 also writes a heartbeat (``heartbeat.py``).

Example:
    with Progress(200, start_step, log_interval=10) as progress:
        with progress.phase("train"):
            ...
        progress.step(report)
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console

from megatron_tropd.reporting.progress.displays import Display, LineDisplay, LiveDisplay
from megatron_tropd.reporting.progress.heartbeat import Activity, GetCounts, Heartbeat
from megatron_tropd.reporting.progress.phase_clock import PhaseClock
from megatron_tropd.reporting.progress.text import Eta
from megatron_tropd.reports import EvalReport, StepReport
from megatron_tropd.standard_streams import silence


class NullProgress:
    """Measures the seconds of the phases, knows what the rank does, and shows nothing."""

    def __init__(self, start_step: int = 0) -> None:
        self._clock = PhaseClock()
        self.activity = Activity(step=start_step, phase="", since=time.monotonic())
        """Replaced as a whole by the main thread; other threads read it."""

    def __enter__(self) -> NullProgress:
        return self

    def __exit__(self, *_exception: object) -> None:
        return None

    def begin_step(self, step: int) -> None:
        """Report that ``step`` is being made from now on."""
        self.activity = Activity(step=step, phase="", since=time.monotonic())

    @contextlib.contextmanager
    def phase(self, name: str, counts: GetCounts | None = None) -> Iterator[None]:
        """Measure the body as phase ``name``; ``counts`` says how far it is, to other threads."""
        around = self.activity
        self.activity = Activity(step=around.step, phase=name, since=time.monotonic(), counts=counts)
        try:
            with self._clock.phase(name):
                yield
        finally:
            self.activity = around

    def take_seconds(self) -> dict[str, float]:
        """Wall seconds by phase since the last call."""
        return self._clock.take_seconds()

    def detail(self, text: str) -> None:
        """Report how far the open phase got, such as ``37/128 rollouts``."""

    def step(self, report: StepReport) -> None:
        """Report a finished step."""

    def evaluation(self, report: EvalReport) -> None:
        """Report a finished evaluation."""

    def message(self, text: str) -> None:
        """Report a text that a person should read."""


class Progress(NullProgress):
    """Measures the seconds of the phases and shows the run."""

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        log_interval: int,
        stream: TextIO | None = None,
        *,
        console: Console | None = None,
        run_dir: Path | None = None,
        heartbeat_interval: float = 0.0,
    ) -> None:
        """``run_dir``: where the heartbeat goes, every ``heartbeat_interval`` seconds; 0 or None for no heartbeat."""
        super().__init__(start_step)
        self._stream = stream or sys.stdout
        self._display = _choose_display(total_steps, start_step, log_interval, self._stream, console)
        self._eta = Eta(total_steps)
        self._first_accuracy: dict[str, float] = {}
        interval = heartbeat_interval if run_dir else 0.0
        self._heartbeat = Heartbeat(run_dir or Path(), interval, lambda: self.activity, self._beat)

    def __enter__(self) -> Progress:
        self._show(lambda display: display.start())
        self._heartbeat.start()
        self._eta.start(time.perf_counter())
        return self

    def __exit__(self, *_exception: object) -> None:
        self._heartbeat.stop()
        self._show(lambda display: display.close())

    @contextlib.contextmanager
    def phase(self, name: str, counts: GetCounts | None = None) -> Iterator[None]:
        """Measure the body as phase ``name`` and show that it is going on."""
        try:
            with super().phase(name, counts):
                self.detail("")
                yield
        finally:
            self.detail("")

    def _beat(self, text: str) -> None:
        """Show a line of the heartbeat, from its thread."""
        if (display := self._display) is not None:
            display.heartbeat(text)

    def detail(self, text: str) -> None:
        """Show how far the open phase got; cheap enough to call for every rollout."""
        self._show(lambda display: display.phase(self._clock.current, text))

    def step(self, report: StepReport) -> None:
        """Show a finished step."""
        eta = self._eta.after(report.step, time.perf_counter())
        self._show(lambda display: display.step(report, eta))

    def evaluation(self, report: EvalReport) -> None:
        """Show an evaluation, compared with the first one that this process saw."""
        before = self._first_accuracy.get(report.decoding)
        self._first_accuracy.setdefault(report.decoding, report.accuracy)
        self._show(lambda display: display.evaluation(report, before))

    def message(self, text: str) -> None:
        """Show a line of text."""
        self._show(lambda display: display.message(text))

    def _show(self, event: Callable[[Display], None]) -> None:
        """Pass an event to the display; a lost terminal (``| head``, a lost connection) does not end the training."""
        if self._display is None:
            return
        try:
            event(self._display)
        except OSError:
            self._display = None
            silence(self._stream)


def _choose_display(
    total_steps: int, start_step: int, log_interval: int, stream: TextIO, console: Console | None
) -> Display | None:
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    console = console or Console(file=stream)
    if console.is_terminal and not plain:
        return LiveDisplay(total_steps, start_step, console)
    return LineDisplay(total_steps, start_step, log_interval, stream)
