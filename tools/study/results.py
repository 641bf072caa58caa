"""The file of results: one line of JSON per finished cell, in the order in which they finished."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.reporting.records import of_kind, read_records
from tools.study.plan import Cell

DECODINGS = ("top_p_0.7", "greedy", "temperature_1")
BLOCK = 5
"""Steps of a run whose mean is one point of its curves."""
VERSIONS = ("torch", "megatron-core", "transformers")


class ResultsError(ValueError):
    """A file of results cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One line of the file: what a cell is, and what came out.  Floats are rounded, to keep the file small."""

    world: str
    method: str
    lr: float
    steps: int
    seed: int
    flags: Mapping[str, str]
    """Those that differ from the flags that all cells share (``plan.SHARED_FLAGS``)."""
    settings: str
    """``worlds.settings_of`` the cell."""
    before: Mapping[str, float]
    """Decoding -> accuracy of the student before the run, 0 to 1."""
    after: Mapping[str, float]
    entropy: Sequence[float]
    """Of the student on its own tokens, nats; the mean of every ``BLOCK`` steps."""
    grad_norm: Sequence[float]
    """Before clipping; the mean of every ``BLOCK`` steps."""
    trusted: Sequence[float]
    """Share of trusted on-policy tokens, by the method's gate or the paper's: mean of the first and the last block."""
    cpu_seconds: float
    commit: str
    versions: Mapping[str, str]

    @property
    def cell(self) -> Cell:
        """The cell that this is the result of."""
        return Cell(world=self.world, method=self.method, lr=self.lr, steps=self.steps, seed=self.seed)


def result_of_run(cell: Cell, settings: str, run_dir: Path, cpu_seconds: float) -> Result:
    """Read the result of a finished run from its run directory; ``settings`` is the digest of the cell's.

    Raises:
        ResultsError: the run directory does not hold all of a finished run.
    """
    records = read_records(run_dir / "metrics.jsonl")
    evals, steps = of_kind(records, "eval"), of_kind(records, "step")
    accuracy = {
        at: {line["decoding"]: round(line["accuracy"], 4) for line in evals if line["step"] == at}
        for at in (0, cell.steps)
    }
    if len(steps) != cell.steps or any(set(found) != set(DECODINGS) for found in accuracy.values()):
        raise ResultsError(f"{run_dir} has {len(steps)} of {cell.steps} steps, or not both evaluations")
    environment = json.loads((run_dir / "env.json").read_text(encoding="utf-8"))
    trusted = _blocks(steps, "tropd/trusted_frac")
    return Result(
        **asdict(cell),
        flags=cell.own_flags,
        settings=settings,
        before=accuracy[0],
        after=accuracy[cell.steps],
        entropy=_blocks(steps, "student/entropy"),
        grad_norm=_blocks(steps, "grad_norm"),
        trusted=[trusted[0], trusted[-1]],
        cpu_seconds=round(cpu_seconds, 1),
        commit=_commit(environment["git"]),
        versions={
            "python": environment["python"],
            **{name: environment["packages"][name] for name in VERSIONS},
        },
    )


def _blocks(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Means over blocks of steps; a step without the number, as one without on-policy tokens is, counts in none."""
    means = []
    for first in range(0, len(steps), BLOCK):
        found = [line.get(name, line["metrics"].get(name)) for line in steps[first : first + BLOCK]]
        values = [value for value in found if value is not None]
        means.append(float(f"{sum(values) / len(values):.4g}") if values else 0.0)
    return means


def _commit(git: Mapping[str, Any] | None) -> str:
    if not git:
        return "unknown"
    return f"{git['sha'][:12]}{' with changes' if git.get('dirty') else ''}"


def append(path: Path, result: Result) -> None:
    """Add a line; it is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(result), separators=(",", ":")) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def repair(path: Path) -> bool:
    """Remove a last line that has no end, as a command that was killed leaves it; returns whether there was one."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole == content:
        return False
    os.truncate(path, len(whole))
    return True


def read(path: Path) -> list[Result]:
    """All results, in the order of the file.

    Raises:
        ResultsError: a line is not a result, or two are of one cell.
        OSError: the file cannot be read.
    """
    results: dict[Cell, Result] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = Result(**json.loads(line))
        except (TypeError, ValueError) as error:
            raise ResultsError(f"{path}, line {number} is not a result of this study: {error}") from error
        if result.cell in results:
            raise ResultsError(f"{path}, line {number}: {result.cell.name} is there twice; remove one of the lines")
        results[result.cell] = result
    return list(results.values())


def finished(results: Iterable[Result], settings_of: Callable[[Cell], str], path: Path) -> set[Cell]:
    """The cells that need no run.

    Raises:
        ResultsError: a result was made with other settings than ``settings_of`` its cell.
    """
    done = set()
    for result in results:
        if result.settings != (expected := settings_of(result.cell)):
            raise ResultsError(
                f"{path}: {result.cell.name} was made with other settings (digest {result.settings}, expected "
                f"{expected}); give --directory another directory, or remove the line to make it again"
            )
        done.add(result.cell)
    return done
