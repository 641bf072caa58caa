"""Two ways to show a run: lines for a log file, a live panel for a terminal."""

from __future__ import annotations

import os
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_tropd.reporting.metric_names import PHASES
from megatron_tropd.reporting.progress.text import duration, eval_line, percent, step_fields, step_line
from megatron_tropd.reports import EvalReport, StepReport

_REFRESH_SECONDS = 0.1


class Display(Protocol):
    """Where progress is shown."""

    def start(self) -> None:
        """Prepare the display, before the first event."""

    def phase(self, name: str, detail: str) -> None:
        """Show that a phase began, ended (empty name) or made progress (``detail``)."""

    def step(self, report: StepReport, eta: float | None) -> None:
        """Show a finished step."""

    def evaluation(self, report: EvalReport, before: float | None) -> None:
        """Show a finished evaluation; ``before`` is the first accuracy with this way of decoding."""

    def message(self, text: str) -> None:
        """Show a text that a person should read."""

    def heartbeat(self, text: str) -> None:
        """Show that a long phase goes on.  Called by another thread, so no lock may be taken."""

    def close(self) -> None:
        """Close the display, after the last event."""


class LineDisplay:
    """One line every ``log_interval`` steps; first, last and skipped steps always."""

    def __init__(self, total_steps: int, start_step: int, log_interval: int, stream: TextIO) -> None:
        self._total_steps = total_steps
        self._first_step = start_step + 1
        self._log_interval = max(log_interval, 1)
        self._stream = stream

    def start(self) -> None:
        """Do nothing: there is nothing to prepare."""

    def phase(self, name: str, detail: str) -> None:
        """Do nothing: phases would only fill the log, and their seconds are in ``metrics.jsonl``."""

    def step(self, report: StepReport, eta: float | None) -> None:
        """Write the line of a step that is due."""
        always = report.step in (self._first_step, self._total_steps) or report.verdict == "skipped"
        if always or report.step % self._log_interval == 0:
            self.message(step_line(report, self._total_steps, eta))

    def evaluation(self, report: EvalReport, before: float | None) -> None:
        """Write the line of an evaluation."""
        self.message(eval_line(report, before))

    def message(self, text: str) -> None:
        """Write and flush a line at once, so that the log is complete after a crash."""
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def heartbeat(self, text: str) -> None:
        """Write the line past the stream's buffer, whose lock a forked checkpoint writer could find held."""
        os.write(self._stream.fileno(), f"{text}\n".encode())

    def close(self) -> None:
        """Do nothing: the stream belongs to the caller."""


class LiveDisplay:
    """A panel that is redrawn in place.

    It is redrawn by events and not by a thread: checkpoint writers are forked from this process, and a
    fork while a thread holds the console's lock would leave a child that hangs when it prints.
    """

    def __init__(self, total_steps: int, start_step: int, console: Console) -> None:
        self._total_steps = total_steps
        self._step = start_step
        self._fields: dict[str, str] = {}
        self._accuracy: dict[str, str] = {}
        self._eta: float | None = None
        self._phase, self._detail = "", ""
        self._skipped = 0
        self._drawn_at = 0.0
        self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)

    def start(self) -> None:
        """Draw the first panel."""
        self._live.start(refresh=True)

    def phase(self, name: str, detail: str) -> None:
        """Show the phase; redrawn at most ten times a second where only the detail is new."""
        new = name != self._phase
        self._phase, self._detail = name, detail
        self._draw(now=new)

    def step(self, report: StepReport, eta: float | None) -> None:
        """Show the numbers of the step."""
        self._step, self._eta, self._fields = report.step, eta, step_fields(report)
        if report.verdict == "skipped":
            self._skipped += 1
            self.message(step_line(report, self._total_steps, None))
        self._draw(now=True)

    def evaluation(self, report: EvalReport, before: float | None) -> None:
        """Print the line above the panel and show the accuracy inside the panel."""
        change = "" if before is None else f" ({100 * (report.accuracy - before):+.1f})"
        self._accuracy[report.decoding] = f"{percent(report.accuracy)}{change}"
        self.message(eval_line(report, before))

    def message(self, text: str) -> None:
        """Print above the panel, without reading markup: model text may look like markup."""
        self._live.console.print(Text(text), soft_wrap=True)
        self._draw(now=True)

    def heartbeat(self, text: str) -> None:
        """Do nothing: the panel names the phase, and it is not drawn by a thread."""

    def close(self) -> None:
        """Leave the last panel on the screen."""
        self._phase, self._detail = "", ""
        self._live.stop()

    def _draw(self, *, now: bool) -> None:
        if now or time.monotonic() - self._drawn_at > _REFRESH_SECONDS:
            self._drawn_at = time.monotonic()
            self._live.refresh()

    def _render(self) -> Panel:
        body = Table.grid(padding=(0, 1), expand=True)
        body.add_column(ratio=1)
        body.add_row(self._bar())
        body.add_row(self._phases())
        if self._fields:
            body.add_row(_pairs(self._fields))
        if self._accuracy:
            body.add_row(_pairs({f"eval {name}": value for name, value in self._accuracy.items()}))
        return Panel(body, title="megatron_tropd", title_align="left", border_style="dim")

    def _bar(self) -> Table:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        left = "done" if self._step >= self._total_steps else f"eta {duration(self._eta) or '-'}"
        skipped = f"  {self._skipped} skipped" if self._skipped else ""
        label = Text(f"step {self._step}/{self._total_steps}", style="bold")
        bar.add_row(label, ProgressBar(total=max(self._total_steps, 1), completed=self._step), f"{left}{skipped}")
        return bar

    def _phases(self) -> Text:
        line = Text()
        for name in PHASES:
            line.append(f"{name} ", style="bold cyan" if name == self._phase else "dim")
        if self._phase and self._phase not in PHASES:
            line.append(f"{self._phase} ", style="bold cyan")
        return line.append(self._detail)


def _pairs(fields: dict[str, str]) -> Text:
    """Labels and values in a row; a pair is never broken over two lines."""
    line = Text()
    for label, value in fields.items():
        line.append(f"{label} ".replace(" ", "\N{NO-BREAK SPACE}"), style="dim")
        line.append(value.replace(" ", "\N{NO-BREAK SPACE}"), style="bold").append("   ")
    return line
