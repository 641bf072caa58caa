"""Everything that ``tools/collect_results.py`` prints and writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.atomic_files import write_text
from tools.results.figures import figure_3_names, save_figures
from tools.results.tables import ResultsTable, cells, csv_rows, make_tables
from tools.results.tree import Row, read_rows

MARKDOWN, CSV, FIGURES = "results.md", "results.csv", "figures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a directory of rows holds."""

    rows: tuple[Row, ...]
    tables: tuple[ResultsTable, ...]

    @classmethod
    def of(cls, directory: Path) -> Results:
        """Read the rows below ``directory``; errors as :func:`read_rows`."""
        rows = read_rows(directory)
        return cls(rows=tuple(rows), tables=tuple(make_tables(rows)))

    @property
    def problems(self) -> list[str]:
        """What could not be used, each with its file."""
        return [problem for row in self.rows for seed in row.seeds for problem in seed.problems]


def text(results: Results) -> str:
    """The tables for a terminal."""
    parts = []
    for table in results.tables:
        notes = "\n".join(f"- {note}" for note in table.notes)
        parts.append(f"{heading(table)}\n\n{cells(table).text()}\n\n{notes}")
    return "\n\n\n".join(parts)


def markdown(results: Results, figures: Sequence[Path]) -> str:
    """The tables, notes and figures as a Markdown page.

    Args:
        results: what was read.
        figures: paths of figures, relative to the page.
    """
    parts = ["# Results"]
    for table in results.tables:
        notes = "\n".join(f"- {_plain(note)}" for note in table.notes)
        shown = [path for path in figures if path.suffix == ".png" and _belongs(path, table)]
        images = "\n".join(f"![{path.stem}]({path.as_posix()})" for path in shown)
        parts += [f"## {_plain(heading(table))}", _plain(cells(table).markdown()), notes, images]
    if results.problems:
        parts += ["## Not used", "\n".join(f"- {_plain(problem)}" for problem in results.problems)]
    return "\n\n".join(part for part in parts if part) + "\n"


def heading(table: ResultsTable) -> str:
    """Name, setting and title of a table."""
    number = table.table.removeprefix("table")
    name = f"Table {number}" if number.isdigit() else table.table
    return f"{name}, {table.setting}: {table.title}"


def _belongs(path: Path, table: ResultsTable) -> bool:
    return path.stem in {f"figure1_{table.name}", *figure_3_names(table).values()}


def _plain(words: str) -> str:
    """Text that Markdown shows as it is, where a name could be taken for HTML."""
    return words.replace("&", "&amp;").replace("<", "&lt;")


def csv_text(results: Results) -> str:
    """All numbers, one line a method and column."""
    lines = [line for table in results.tables for line in csv_rows(table)]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()


def save(results: Results, directory: Path) -> list[Path]:
    """Write ``results.md``, ``results.csv`` and the figures; returns their paths.

    Raises:
        OSError: the directory cannot be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    figures = save_figures(results.tables, results.rows, directory / FIGURES)
    write_text(directory / MARKDOWN, markdown(results, [path.relative_to(directory) for path in figures]))
    write_text(directory / CSV, csv_text(results))
    return [directory / MARKDOWN, directory / CSV, *figures]
