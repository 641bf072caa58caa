"""A directory of a table's rows, as ``examples/paper/`` writes it.

OUT/TABLE/SETTING/ROW/row.json           what the row is: table, setting, row, title, method_flags
OUT/TABLE/SETTING/ROW/seed-N/run/        run directory of a training run
OUT/TABLE/SETTING/ROW/seed-N/benchmark/  --output of ``python -m megatron_tropd.benchmark``
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.benchmarks.results import CONFIG, Result, read_scores
from megatron_tropd.json_files import read_json_object
from tools.results.run_files import Run, is_run, read_run

ROW, RUN, BENCHMARK = "row.json", "run", "benchmark"
_NAMES = ("table", "setting", "row", "title")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """One training run of a row and its benchmarks; either may be missing."""

    name: str
    run: Run | None
    benchmarks: dict[str, Result]
    """The complete ones."""
    settings: dict[str, Any]
    """Benchmark -> how it was measured (``config.json``)."""
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One method of a table."""

    path: Path
    table: str
    setting: str
    row: str
    title: str
    seeds: tuple[Seed, ...]


def read_rows(directory: Path) -> list[Row]:
    """Read every row below ``directory``, which may be OUT, a table, a setting or a single row.

    Raises:
        ValueError: there is none, a ``row.json`` cannot be used, or two rows are the same.
    """
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory; expected one with TABLE/SETTING/ROW/{ROW} below it")
    found = sorted(path for depth in range(4) for path in directory.glob("*/" * depth + ROW))
    if not found:
        raise ValueError(
            f"{directory} has no {ROW} below it; expected TABLE/SETTING/ROW/{ROW}, as examples/paper writes"
        )
    seeds = {path.parent for depth in range(1, 4) for path in directory.glob("*/" * depth + "seed-*")}
    if nameless := sorted(seeds - {path.parent for path in found}):
        raise ValueError(f"{nameless[0]} has runs but no {ROW}, which says of what table it is")
    rows: dict[tuple[str, str, str], Row] = {}
    for path in found:
        row = _read_row(path)
        key = (row.table, row.setting, row.row)
        if key in rows:
            raise ValueError(f"{path.parent} and {rows[key].path} are both row {row.row} of {row.table}, {row.setting}")
        rows[key] = row
    return list(rows.values())


def _read_row(path: Path) -> Row:
    content = read_json_object(path)
    names = {name: content.get(name) for name in _NAMES}
    bad = [name for name, value in names.items() if not isinstance(value, str) or not value.strip()]
    if bad:
        raise ValueError(f"{path} has no text for {', '.join(bad)}; expected the keys {', '.join(_NAMES)}")
    seeds = sorted(path.parent.glob("seed-*"), key=lambda seed: (_number(seed.name), seed.name))
    texts = {name: " ".join(str(value).split()) for name, value in names.items()}
    return Row(path=path.parent, seeds=tuple(_read_seed(seed) for seed in seeds if seed.is_dir()), **texts)


def _number(name: str) -> int:
    digits = re.sub(r"\D", "", name)
    return int(digits) if digits.isascii() and digits else 0


def _read_seed(path: Path) -> Seed:
    run = read_run(path / RUN) if is_run(path / RUN) else None
    benchmarks, problems = read_benchmarks(path / BENCHMARK)
    settings: dict[str, Any] = {}
    if (path / BENCHMARK / CONFIG).is_file():
        try:
            settings = read_json_object(path / BENCHMARK / CONFIG).get("benchmarks", {})
        except (OSError, ValueError) as error:
            problems.append(f"{error}: how it was measured is not known")
    return Seed(
        name=path.name, run=run, benchmarks=benchmarks, settings=settings if isinstance(settings, dict) else {},
        problems=(*(run.problems if run else ()), *problems),
    )  # fmt: skip


def read_benchmarks(path: Path) -> tuple[dict[str, Result], list[str]]:
    """The complete benchmarks of an output directory, and what of it cannot be used."""
    found, problems = {}, []
    for name in BENCHMARKS:
        try:
            result = read_scores(path, name)
            if result is not None:
                result.estimate()
                found[name] = result
        except KeyError as error:
            problems.append(f"{path}: {name} is left out: it has no scores {error}")
        except (OSError, TypeError, ValueError) as error:
            problems.append(f"{path}: {name} is left out: {error}")
    return found, problems
