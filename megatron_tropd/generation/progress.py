"""What is shown while responses are written: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from megatron_tropd.reporting.progress.text import count, duration, percent
from megatron_tropd.standard_streams import silence

_LINE_EVERY_S = 30.0


class GenerationProgress:
    """Counts finished responses and shows them.  A context manager; nothing is shown outside.

    Args:
        total: responses of the whole job.
        stored: of them, those that earlier launches wrote.
        stream: where to show it.
        clock: seconds, for tests.
    """

    def __init__(self, total: int, stored: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._earlier, self._stream, self._clock = total, stored, stream, clock
        self._responses = self._tokens = self._cut = 0
        self._started = clock()
        self._next_line = self._started
        self._lost = False
        terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._live = Live(console=Console(file=stream), auto_refresh=False) if terminal else None

    def __enter__(self) -> GenerationProgress:
        self._started = self._clock()
        if self._live:
            self._show(self._live.start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._show(self._live.stop)

    def _show(self, event: Callable[[], object]) -> None:
        """Show something; a lost terminal or a full log does not end the work."""
        if self._lost:
            return
        try:
            event()
        except OSError:
            self._lost = True
            silence(self._stream)

    def add(self, *, responses: int, tokens: int, cut: int) -> None:
        """Count finished responses, and show them if it is time."""
        self._responses, self._tokens, self._cut = self._responses + responses, self._tokens + tokens, self._cut + cut
        if self._live:
            bar = Table.grid(padding=1)
            bar.add_row(ProgressBar(total=self._total, completed=self._done, width=40), Text(self.line()))
            live = self._live
            self._show(lambda: live.update(bar, refresh=True))
        elif self._clock() >= self._next_line or self._done == self._total:
            self._next_line = self._clock() + _LINE_EVERY_S
            self._show(lambda: print(self.line(), file=self._stream, flush=True))

    @property
    def _done(self) -> int:
        return self._earlier + self._responses

    def line(self) -> str:
        """Return what is known: how many responses, tokens per second of this launch, and the time left at its pace."""
        seconds = self._clock() - self._started
        parts = [f"{self._done:,} of {self._total:,} responses ({percent(self._done / self._total)})"]
        if self._responses and seconds > 0:
            parts.append(f"{count(self._tokens / seconds)} tokens/s")
            parts.append(f"length {self._tokens / self._responses:.0f}")
            parts.append(f"cut {percent(self._cut / self._responses)}")
            parts.append(f"eta {duration(seconds / self._responses * (self._total - self._done))}")
        return " | ".join(parts)
