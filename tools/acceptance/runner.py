"""Runs the sections one after the other, each in a process group of its own that is killed at its deadline.

Needs no torch: this process never touches the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from .sections import Section
from .setting import Setting
from .table import Results, Row, SectionEnd, read_row, write

ROOT = Path(__file__).resolve().parents[2]
_LEAST_S = 5.0
"""A section for which less time is left is not begun."""
_TAIL_BYTES, _TAIL_LINES = 4000, 6
_HIDDEN = {
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "TRITON_INTERPRET",
}  # fmt: skip
"""Variables of a job that the command may be started in, and of tests: a section is a job of its own, on kernels that
are compiled."""


def environment(device: str) -> dict[str, str]:
    """Return the environment of a section: one GPU or none, no network, nothing of a job that this may be part of."""
    kept = {name: value for name, value in os.environ.items() if name not in _HIDDEN}
    visible = kept.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    path = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    threads = {} if device == "cuda" else {"OMP_NUM_THREADS": "1"}  # tiny shapes; idle threads that spin take a core
    return {
        # All ranks are on this machine, which may have no other network and a host name that nobody resolves.
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **threads,
        **kept,
        "CUDA_VISIBLE_DEVICES": visible if device == "cuda" else "",
        # Otherwise CUDA may number GPUs in another order than nvidia-smi, which names the hardware.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        # cuBLAS then computes equal products equally in every call; on Hopper this is torch's default size.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A section's process, which has begun to import, and its files."""

    section: Section
    process: subprocess.Popen[str]
    rows: Path
    log: Path

    @classmethod
    def start(cls, section: Section, setting: Setting) -> Process:
        """Start it; it waits for :meth:`go`."""
        folder = setting.directory / "sections"
        folder.mkdir(parents=True, exist_ok=True)
        rows, log = folder / f"{section.letter}.jsonl", folder / f"{section.letter}.log"
        rows.write_text("", encoding="utf-8")
        words = [sys.executable, "-W", "ignore", "-m", "tools.acceptance.run_one", section.letter, section.module]
        words += [str(rows), *(["--product"] if section.product else [])]
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment(setting.device), stdin=subprocess.PIPE, stdout=output,
                stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip
        return cls(section=section, process=process, rows=rows, log=log)

    def go(self, setting: Setting) -> None:
        """Let it begin."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; its exit status says so
            self.process.stdin.write(setting.to_json() + "\n")
            self.process.stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """Return the exit status, or None if it had to be killed after ``seconds``."""
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill it with everything that it started: its group, and servers that lead groups of their own."""
        children = []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def found(self) -> list[Row]:
        """Return the rows that it reported; a line that was cut off is left out."""
        rows = []
        for line in self.rows.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                rows.append(read_row(json.loads(line)))
        return rows

    def tail(self) -> str:
        """Return the last lines that it printed."""
        lines = self.log.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").splitlines()
        return " / ".join([line.strip() for line in lines if line.strip()][-_TAIL_LINES:])


def _ending(running: Process, status: int | None, seconds: float, cut: bool) -> tuple[list[Row], str]:
    """Return the rows of a section that has ended, and how it ended."""
    letter, rows = running.section.letter, running.found()
    if status is None and cut:
        reason = f"cut off after {seconds:.0f} s: --time-limit was over"
        return [*rows, Row(section=letter, what="the rest of the section", verdict="not run", reason=reason)], "cut off"
    if status is None:
        how = f"killed at its deadline of {seconds:.0f} s"
        reason = f"{how}; it last printed: {running.tail()}"
        return [*rows, Row(section=letter, what="the section", verdict="failed", reason=reason)], how
    if status and not any(row.verdict == "failed" for row in rows):
        reason = f"ended with status {status}; it last printed: {running.tail()}"
        rows.append(Row(section=letter, what="the section", verdict="failed", reason=reason))
    if not rows:
        rows.append(Row(section=letter, what="the section", verdict="failed", reason="it reported nothing"))
    return rows, "ended" if not status else f"ended with status {status}"


def run_sections(
    sections: Sequence[Section], setting: Setting, *, hardware: Mapping[str, str], command: str, time_limit: float,
    tell: Callable[[str], None] = print, began: float | None = None,
) -> Results:  # fmt: skip
    """Run the sections and write the table after each.

    Args:
        sections: What to run.
        setting: What the sections are told.
        hardware: For the table.
        command: For the table.
        time_limit: Seconds for all sections together, from ``began`` on.
        tell: Takes a line for whoever waits.
        began: ``time.monotonic()`` of the beginning; by default now.
    """
    end = (time.monotonic() if began is None else began) + time_limit
    results = Results(command=command, hardware=hardware, sections=(), rows=())
    write(setting.directory, results)
    started: list[Process] = []
    try:
        for place in range(len(sections)):
            for following in sections[len(started) : place + 2]:  # the next one imports while this one runs
                started.append(Process.start(following, setting))
            rows, ending = _run(started[place], setting, end)
            results = replace(results, rows=(*results.rows, *rows), sections=(*results.sections, ending))
            write(setting.directory, results)
            tell(_told(ending, rows))
    finally:
        for running in started:
            running.kill()
    return results


def _run(running: Process, setting: Setting, end: float) -> tuple[list[Row], SectionEnd]:
    section, left = running.section, end - time.monotonic()
    if left < _LEAST_S:
        running.kill()
        rows = [Row(section=section.letter, what="the section", verdict="not run", reason="--time-limit was over")]
        return rows, SectionEnd(letter=section.letter, title=section.title, seconds=0.0, how="not run")
    deadline = min(section.deadline(setting.device), left)
    start = time.monotonic()
    running.go(replace(setting, seconds=deadline))
    status = running.wait(deadline)
    seconds = time.monotonic() - start
    rows, how = _ending(running, status, deadline, deadline < section.deadline(setting.device))
    return rows, SectionEnd(letter=section.letter, title=section.title, seconds=seconds, how=how)


def _told(ending: SectionEnd, rows: Sequence[Row]) -> str:
    bad = [
        f"\n    {row.verdict}: {row.what} {row.measured} {row.reason}"
        for row in rows
        if row.verdict in ("failed", "miss")
    ]
    return f"{ending.letter}. {ending.title}: {len(rows)} rows, {ending.seconds:.0f} s, {ending.how}{''.join(bad)}"
