"""Progress: phase seconds, plain lines, the live panel."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from megatron_tropd.reporting.progress.phase_clock import PhaseClock
from megatron_tropd.reporting.progress.progress import NullProgress, Progress
from megatron_tropd.reporting.progress.text import Eta, count, duration
from megatron_tropd.reports import Accuracy
from tests.test_reporting_files import eval_report, step_report


def run_steps(progress, last: int, first: int = 1) -> None:
    with progress:
        for step in range(first, last + 1):
            with progress.phase("train"):
                progress.detail("1/1 micro-batches")
            progress.step(step_report(step, verdict="skipped" if step == 3 else "stepped"))


def test_plain_lines():
    stream = io.StringIO()
    progress = Progress(20, 0, 5, stream)
    run_steps(progress, 11)
    lines = stream.getvalue().splitlines()
    # The first, the skipped one, and every fifth.
    assert [line.split(" | ")[0] for line in lines] == [f"step {step:2d}/20" for step in (1, 3, 5, 10)]
    fields = "loss 1.0000 | grad norm 0.500 | lr 1.00e-06 | trusted 90.0% | guidance 10.0% | tokens/s 40"
    assert fields in lines[0] and "eta " in lines[0]
    assert "SKIPPED" in lines[1] and "SKIPPED" not in lines[2]
    assert "\x1b" not in stream.getvalue()


def test_evaluation_line_shows_the_change():
    stream = io.StringIO()
    with Progress(20, 0, 5, stream) as progress:
        progress.evaluation(eval_report(0, 0.25))
        progress.evaluation(eval_report(20, 0.5))
    first, last = stream.getvalue().splitlines()
    assert first == "eval at step 0 | greedy: accuracy 25.0% +- 5.0 | prompts 100 | length 20.0 | finished 90.0%"
    assert "accuracy 50.0% +- 5.0 (+25.0 points)" in last


def test_evaluation_line_shows_samples_and_domains():
    stream = io.StringIO()
    domains = {
        name: Accuracy(accuracy=share, std_error=0.1, num_prompts=50) for name, share in (("code", 0.2), ("math", 0.8))
    }
    with Progress(20, 0, 5, stream) as progress:
        progress.evaluation(eval_report(0, num_samples=32, domains=domains))
    assert "| prompts 100 x 32 | length 20.0 | finished 90.0% | code 20.0% | math 80.0%" in stream.getvalue()


def test_live_panel():
    stream = io.StringIO()
    progress = Progress(20, 0, 5, console=Console(force_terminal=True, file=stream, width=110))
    with progress:
        progress.evaluation(eval_report(0, 0.25))
        with progress.phase("generate"):
            progress.detail("3/8 rollouts")
        progress.step(step_report(1))
        progress.message("[red]not markup[/red]")
    shown = stream.getvalue()
    for text in ("step 1/20", "generate", "greedy", "25.0%", "trusted", "90.0%", "[red]not markup[/red]", "eta"):
        assert text in shown
    assert "\x1b[" in shown


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_plain_where_the_terminal_asks_for_it(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    stream = io.StringIO()
    run_steps(Progress(2, 0, 1, stream, console=Console(force_terminal=True, file=stream)), 2)
    assert len(stream.getvalue().splitlines()) == 2 and "\x1b" not in stream.getvalue()


@pytest.mark.fault(number=30)
def test_a_reader_that_went_away_does_not_stop_the_run():
    code = (
        "from megatron_tropd.reporting.progress.progress import Progress\n"
        "from tests.test_reporting_progress import run_steps\n"
        "progress = Progress(3, 0, 1)\n"
        "run_steps(progress, 3)\n"
        "assert progress.take_seconds()['train'] > 0"
    )
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 0, done.stderr


def test_null_progress_measures(capsys):
    progress = NullProgress()
    run_steps(progress, 2)
    assert progress.take_seconds()["train"] > 0
    assert progress.take_seconds() == {}
    assert capsys.readouterr().out == ""


def test_nested_phases_add_up():
    clock = PhaseClock()
    begin = time.perf_counter()
    with clock.phase("train"):
        time.sleep(0.02)
        with clock.phase("eval"):
            time.sleep(0.05)
        assert clock.current == "train"
    whole = time.perf_counter() - begin
    seconds = clock.take_seconds()
    assert seconds["eval"] >= 0.05 and 0.02 <= seconds["train"] <= whole - seconds["eval"]
    with pytest.raises(RuntimeError), clock.phase("push"):
        raise RuntimeError
    assert clock.current == "" and "push" in clock.take_seconds()


def test_eta_forgets_the_slow_start():
    eta = Eta(100)
    eta.start(0.0)
    assert eta.after(1, 60.0) == 60.0 * 99
    left = [eta.after(step, 60.0 + step) for step in range(2, 31)]
    assert left[-1] == pytest.approx(70.0)


def test_numbers_as_text():
    assert [duration(value) for value in (None, 0.42, 48.4, 59.7, 80, 7500, 273600)] == [
        "",
        "0.4s",
        "48s",
        "1m00s",
        "1m20s",
        "2h05m",
        "3d04h",
    ]
    assert [count(value) for value in (None, 512.4, 9999, 12345, 1.25e6)] == ["", "512", "9999", "12.3k", "1.2M"]
