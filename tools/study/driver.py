"""Makes the networks and runs the cells that are missing, and adds their results to the file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tropd.reporting.lock import RunLock
from tools.study import results, worlds
from tools.study.jobs import Job, Outcome, run_jobs
from tools.study.plan import Cell, CellFiles, training_flags


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The directory of a study."""

    root: Path

    @property
    def results(self) -> Path:
        """One line per finished cell."""
        return self.root / "results.jsonl"

    @property
    def networks(self) -> Path:
        """The worlds' files."""
        return self.root / "networks"

    @property
    def logs(self) -> Path:
        """What each job printed."""
        return self.root / "logs"

    def run_dir(self, cell: Cell) -> Path:
        """The run directory of a cell while it runs."""
        return self.root / "cells" / cell.name


class StudyError(Exception):
    """The study cannot go on; the message says what is missing and where to look."""


def run_cell(cell: Cell, files: CellFiles, run_dir: Path) -> results.Result:
    """Be the training command, in a process of its own, and return the result.

    What an earlier command left unfinished in ``run_dir`` is removed: a run is made whole or not at all.

    Raises:
        StudyError: the command ended with another exit code than 0.
    """
    from megatron_tropd.train import main

    shutil.rmtree(run_dir, ignore_errors=True)
    started = time.process_time()
    if code := main(training_flags(cell, files, run_dir)):
        raise StudyError(f"python -m megatron_tropd.train ended with exit code {code}")
    return results.result_of_run(cell, worlds.settings_of(cell), run_dir, time.process_time() - started)


@dataclass(kw_only=True)
class _Progress:
    """Prints a line for every job, with the time that the rest will take at the pace so far."""

    total: int
    """Amount of work, in any unit."""
    say: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    done: float = 0.0
    failed: list[str] = field(default_factory=list)

    def ended(self, outcome: Outcome, work: int, text: str) -> None:
        self.done += work
        left = (time.monotonic() - self.started) * (self.total / self.done - 1)
        share = f"{100 * self.done / self.total:3.0f}%"
        self.say(f"{share}  {outcome.job.name}: {text}  {outcome.wall_seconds:.0f} s, about {_minutes(left)} left")

    def fail(self, outcome: Outcome, work: int) -> None:
        self.failed.append(outcome.job.name)
        self.ended(outcome, work, f"FAILED, see {outcome.job.log};")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def make_networks(cells: Sequence[Cell], place: Place, workers: int, say: Callable[[str], None] = print) -> None:
    """Make the networks of the cells' worlds that are not there.

    Raises:
        StudyError: one could not be made.
    """
    missing = [one for one in worlds.networks(cells) if not one.is_made(place.networks)]
    if not missing:
        return
    say(f"making {len(missing)} teachers and students in {place.networks}")
    progress = _Progress(total=len(missing), say=say)
    place.logs.mkdir(parents=True, exist_ok=True)

    def ended(outcome: Outcome) -> None:
        if outcome.failed:
            progress.fail(outcome, 1)
        else:
            scores = ", ".join(f"{name} {value:.1%}" for name, value in outcome.value["accuracy"].items())
            progress.ended(outcome, 1, f"{outcome.value['steps']} steps, {scores};")

    jobs = [
        Job(name=one.name, function=worlds.make, arguments=(one, place.networks), log=place.logs / f"{one.name}.log")
        for one in missing
    ]
    run_jobs(jobs, workers, ended)
    if progress.failed:
        raise StudyError(f"could not be made: {', '.join(progress.failed)}")


def run_cells(
    cells: Sequence[Cell], place: Place, workers: int, *, keep_runs: bool = False, say: Callable[[str], None] = print
) -> None:
    """Run the cells, whose networks are made, and add a line to the results for each as it ends.

    Raises:
        StudyError: some failed; the others are done, and the next call makes those that failed again.
    """
    progress = _Progress(total=sum(cell.steps for cell in cells), say=say)
    place.logs.mkdir(parents=True, exist_ok=True)
    by_name = {cell.name: cell for cell in cells}

    def ended(outcome: Outcome) -> None:
        cell = by_name[outcome.job.name]
        if outcome.failed:
            progress.fail(outcome, cell.steps)
            return
        result: results.Result = outcome.value
        results.append(place.results, result)
        if not keep_runs:
            shutil.rmtree(place.run_dir(cell))
        scores = ", ".join(f"{name} {result.before[name]:.1%} > {result.after[name]:.1%}" for name in results.DECODINGS)
        progress.ended(outcome, cell.steps, f"{scores};")

    run_jobs([_job(cell, place) for cell in cells], workers, ended)
    if progress.failed:
        raise StudyError(f"{len(progress.failed)} of {len(cells)} runs failed: {', '.join(progress.failed)}")


def _job(cell: Cell, place: Place) -> Job:
    files = worlds.files_of(cell, place.networks)
    return Job(
        name=cell.name,
        function=run_cell,
        arguments=(cell, files, place.run_dir(cell)),
        log=place.logs / f"{cell.name}.log",
    )


def run_study(
    cells: Sequence[Cell], place: Place, workers: int, *, keep_runs: bool = False, say: Callable[[str], None] = print
) -> None:
    """Do what is missing of the plan.

    Raises:
        StudyError: a network or a run failed.
        results.ResultsError: the results that are there are of other settings, or are no results.
        OSError: the directory cannot be used, or another command uses it.
    """
    place.root.mkdir(parents=True, exist_ok=True)
    lock = RunLock(place.root / "study.lock")
    try:
        _do_what_is_missing(cells, place, workers, keep_runs=keep_runs, say=say)
    finally:
        lock.release()


def _do_what_is_missing(
    cells: Sequence[Cell], place: Place, workers: int, *, keep_runs: bool, say: Callable[[str], None]
) -> None:
    if results.repair(place.results):
        say(f"{place.results}: removed an incomplete last line")
    found = results.read(place.results) if place.results.is_file() else []
    done = results.finished(found, worlds.settings_of, place.results)
    missing = [cell for cell in cells if cell not in done]
    say(f"{len(cells) - len(missing)} of {len(cells)} runs are in {place.results}")
    make_networks(missing, place, workers, say)
    run_cells(missing, place, workers, keep_runs=keep_runs, say=say)
