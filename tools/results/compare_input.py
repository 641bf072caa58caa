"""The runs that ``tools/compare_runs.py`` is given: their names, and the benchmarks that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.benchmarks.results import SCORES
from megatron_tropd.reporting.records import of_kind, step_scalars
from tools.results.run_files import Run, is_run, read_run
from tools.results.tree import BENCHMARK, RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRun:
    """A run and what it is called on the page."""

    name: str
    run: Run
    benchmark: Path | None
    """``--output`` of the benchmark command; None where there is none."""

    def metrics(self) -> set[str]:
        """Names of what it has curves of: metrics of steps, and ``eval/DECODING``."""
        steps = {name for record in of_kind(self.run.records, "step") for name in step_scalars(record)}
        return steps | {f"eval/{decoding}" for decoding in self.run.final_evaluations()}


def load(paths: Sequence[Path], names: Sequence[str] | None, benchmarks: Sequence[str]) -> list[NamedRun]:
    """Read the runs.

    Args:
        paths: run directories, or directories with ``run/`` and ``benchmark/`` as ``examples/paper/`` writes them.
        names: one for each run; None for the names of their directories.
        benchmarks: ``NAME=DIR`` of runs whose benchmarks lie elsewhere.

    Raises:
        ValueError: a directory is no run, names are not one each, or the runs have nothing to compare.
    """
    places = [path / RUN if not is_run(path) and is_run(path / RUN) else path for path in paths]
    runs = [read_run(place) for place in places]
    if names is not None and len(names) != len(runs):
        raise ValueError(f"--names has {len(names)} names for {len(runs)} runs; give one for each run")
    called = list(names) if names is not None else [default_name(place) for place in places]
    for index, name in enumerate(called):
        if name in called[:index]:
            first, second = places[called.index(name)], places[index]
            raise ValueError(f"{first} and {second} are both called {name}; give --names, one for each run")
    given = _given_benchmarks(benchmarks, called)
    found = [
        NamedRun(name=name, run=run, benchmark=given.get(name) or _benchmark_beside(place))
        for name, run, place in zip(called, runs, places, strict=True)
    ]
    _check_common(found)
    return found


def default_name(place: Path) -> str:
    """The name of a run directory; of ``ROW/seed-N/run`` it is ``ROW/seed-N``."""
    place = place.resolve()
    return f"{place.parent.parent.name}/{place.parent.name}" if place.name == RUN else place.name


def _benchmark_beside(place: Path) -> Path | None:
    sibling = place.resolve().parent / BENCHMARK
    return sibling if place.resolve().name == RUN and (sibling / SCORES).is_dir() else None


def _given_benchmarks(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        # A name may hold "=", so the names of the runs say where it ends.
        name = next((name for name in sorted(names, key=len, reverse=True) if text.startswith(f"{name}=")), None)
        if name is None:
            raise ValueError(f"--benchmark {text}: expected NAME=DIR, NAME one of {', '.join(names)}")
        found[name] = Path(text[len(name) + 1 :])
        if not (found[name] / SCORES).is_dir():
            raise ValueError(
                f"--benchmark {text}: {found[name]} has no {SCORES}/; expected an --output of the benchmark command"
            )
    return found


def _check_common(runs: Sequence[NamedRun]) -> None:
    """Check that there is something to show, and of several runs something that two have in common."""
    recorded = {named.name: found for named in runs if (found := named.metrics())}
    measured = sum(named.benchmark is not None for named in runs)
    if not recorded and not measured:
        raise ValueError(f"nothing is recorded yet in {', '.join(str(named.run.path) for named in runs)}")
    sets = list(recorded.values())
    shared = any(one & other for index, one in enumerate(sets) for other in sets[:index])
    if len(sets) > 1 and not shared and measured < 2:
        told = "; ".join(f"{name} has {_some(found)}" for name, found in recorded.items())
        raise ValueError(f"no two of the runs have a metric in common: {told}")


def _some(names: set[str], most: int = 3) -> str:
    shown = ", ".join(sorted(names)[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
