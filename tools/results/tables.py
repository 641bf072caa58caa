"""The tables: our scores with their standard errors, the paper's below them, and what is missing said to be missing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.benchmarks.tables import Table
from tools.results.errata import errata_of
from tools.results.paper_tables import TABLES, PrintedGroup, PrintedRow
from tools.results.scores import Score, benchmark_score, evaluation_score, mean_score, score_text
from tools.results.tree import Row

MEAN = "mean"
NOT_RUN = "not run"
LEGEND = (
    "Percent, +- standard error. q: over questions, the seeds and samples of a question averaged first. s: over seeds, "
    "where there are several."
)
EVALUATION_LEGEND = (
    "From evaluations of --eval-data in metrics.jsonl, the last of each way of decoding: not the paper's benchmarks, "
    "so none of its numbers stand here. Percent, +- standard error. q: over prompts, the mean of the seeds' own. s: "
    "over seeds, where there are several."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A method: its scores here and the paper's row."""

    title: str
    row: str
    """Name of its directory; empty where there is none."""
    scores: dict[str, Score]
    """Column -> score, of what was measured."""
    printed: PrintedRow | None
    missing: str = NOT_RUN
    """What its cells say that have no score."""
    seeds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultsTable:
    """One table of one setting."""

    table: str
    setting: str
    title: str
    kind: Literal["benchmarks", "evaluations"]
    columns: tuple[str, ...]
    """Benchmarks or ways of decoding; the mean is not among them."""
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Table and setting, for names of files."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.table}_{self.setting}")

    @property
    def name(self) -> str:
        """For names of files; no other table has it."""
        return self.place + ("_evaluations" if self.kind == "evaluations" else "")


def make_tables(rows: Sequence[Row]) -> list[ResultsTable]:
    """The tables of all rows, in the paper's order; tables that the paper has not come last."""
    places = sorted({(row.table, row.setting) for row in rows}, key=_place)
    made = []
    for table, setting in places:
        mine = [row for row in rows if (row.table, row.setting) == (table, setting)]
        evaluated = any(seed.run and seed.run.final_evaluations() for row in mine for seed in row.seeds)
        if any(seed.benchmarks for row in mine for seed in row.seeds) or not evaluated:
            made.append(_benchmark_table(table, setting, mine))
        if evaluated:
            made.append(_evaluation_table(table, setting, mine))
    return made


def _place(key: tuple[str, str]) -> tuple[int, str, int, str]:
    table, setting = key
    tables = list(TABLES)
    settings = [group.setting for group in TABLES[table].groups] if table in TABLES else []
    return (
        tables.index(table) if table in tables else len(tables), table,
        settings.index(setting) if setting in settings else len(settings), setting,
    )  # fmt: skip


def _group(table: str, setting: str) -> PrintedGroup | None:
    return TABLES[table].group(setting) if table in TABLES else None


def _benchmark_table(table: str, setting: str, rows: Sequence[Row]) -> ResultsTable:
    group = _group(table, setting)
    measured = {name for row in rows for seed in row.seeds for name in seed.benchmarks}
    printed = TABLES[table].columns if table in TABLES else ()
    columns = (*printed, *(name for name in BENCHMARKS if name in measured and name not in printed))
    notes: list[str] = []
    lines = [_line(row, group, columns, printed or columns, notes) for row in rows]
    if not group:
        notes.append(f"The paper has no rows for {table}, {setting}.")
    return ResultsTable(
        table=table, setting=setting, title=_title(table, group), kind="benchmarks", columns=columns,
        lines=_with_absent(lines, group),
        notes=(LEGEND, *notes, *_notes_on_settings(columns, rows), *(_erratum_texts(table) if group else ())),
    )  # fmt: skip


def _title(table: str, group: PrintedGroup | None) -> str:
    pair = f"; student {group.student}, teacher {group.teacher}" if group else ""
    return (TABLES[table].title if table in TABLES else table) + pair


def _with_absent(lines: Sequence[Line], group: PrintedGroup | None) -> tuple[Line, ...]:
    """With the printed rows that have no directory, in the paper's order; rows of ours come last."""
    known = group.rows if group else ()
    ours = {line.printed.name for line in lines if line.printed}
    absent = [Line(title=row.name, row="", scores={}, printed=row) for row in known if row.name not in ours]
    order = {row.name: index for index, row in enumerate(known)}
    return tuple(sorted([*lines, *absent], key=lambda line: order[line.printed.name] if line.printed else len(order)))


def _line(
    row: Row, group: PrintedGroup | None, columns: Sequence[str], mean_of: Sequence[str], notes: list[str]
) -> Line:
    scores: dict[str, Score] = {}
    for name in columns:
        results = {seed.name: seed.benchmarks[name] for seed in row.seeds if name in seed.benchmarks}
        if not results:
            continue
        try:
            scores[name] = benchmark_score(results)
        except ValueError as error:
            notes.append(f"{row.title}, {BENCHMARKS[name].title}: {error}; left out.")
    notes.extend(_notes_on_seeds(row, columns))
    return Line(
        title=row.title, row=row.row, scores=_with_mean(scores, mean_of), missing=_missing(row),
        printed=group.row(row.row, row.title) if group else None,
        seeds=tuple(seed.name for seed in row.seeds if seed.benchmarks),
    )  # fmt: skip


def _with_mean(scores: dict[str, Score], columns: Sequence[str]) -> dict[str, Score]:
    """With the mean over the columns if all are there: over fewer it could not be compared."""
    mean = mean_score([scores[name] for name in columns]) if all(name in scores for name in columns) else None
    return scores | ({MEAN: mean} if mean else {})


def _missing(row: Row) -> str:
    """What a cell without a score says."""
    runs = [seed.run for seed in row.seeds if seed.run]
    if not runs:
        return NOT_RUN if not any(seed.benchmarks for seed in row.seeds) else "not measured"
    unfinished = [run.unfinished for run in runs if run.unfinished]
    return f"not measured ({unfinished[0]})" if unfinished else "not measured"


def _notes_on_seeds(row: Row, columns: Sequence[str]) -> list[str]:
    """What a reader of a row must know of its runs."""
    notes = [
        f"{row.title}, {seed.name}: the run is unfinished ({seed.run.unfinished})."
        for seed in row.seeds
        if seed.run and seed.run.unfinished
    ]
    measured = [seed for seed in row.seeds if seed.benchmarks]
    if columns and measured and len(measured) < len(row.seeds):
        without = [seed.name for seed in row.seeds if not seed.benchmarks]
        notes.append(f"{row.title}: without {', '.join(without)}, which no benchmark has measured.")
    for name in columns:
        lacking = [seed.name for seed in measured if name not in seed.benchmarks]
        if lacking and len(lacking) < len(measured):
            notes.append(
                f"{row.title}, {BENCHMARKS[name].title}: without {', '.join(lacking)}, which it has not measured."
            )
    return notes


def _notes_on_settings(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Where rows were not measured alike, and where a benchmark had other questions than the paper's."""
    notes = []
    for name in columns:
        told: dict[str, list[str]] = {}
        counts = set()
        for row in rows:
            for seed in row.seeds:
                if name in seed.benchmarks:
                    counts.add(len(seed.benchmarks[name].questions))
                    settings = seed.settings.get(name)
                    if isinstance(settings, dict):
                        same = {key: value for key, value in settings.items() if key != "samples"}
                        told.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(row.title)
        title, usual = BENCHMARKS[name].title, BENCHMARKS[name].num_questions
        if len(told) > 1:
            groups = " and ".join(", ".join(dict.fromkeys(titles)) for titles in told.values())
            notes.append(f"{title}: not measured alike, so not comparable: {groups} (config.json of each benchmark).")
        if len(counts) > 1:
            notes.append(f"{title}: the rows were asked {' and '.join(map(str, sorted(counts)))} questions.")
        elif usual and counts and counts != {usual}:
            notes.append(f"{title}: {counts.pop()} questions here, {usual} in the paper.")
    return notes


def _erratum_texts(table: str) -> list[str]:
    return [f"In the paper, {item.place}: {item.printed}. {item.comment}" for item in errata_of(table)]


def _evaluation_table(table: str, setting: str, rows: Sequence[Row]) -> ResultsTable:
    """A table from the last evaluations of the runs themselves, of all prompts and of each domain."""
    group = _group(table, setting)
    lines, columns, notes = [], dict[str, None](), list[str]()
    for row in rows:
        found: dict[str, dict[str, dict[str, object]]] = {}
        for seed in row.seeds:
            for decoding, record in (seed.run.final_evaluations() if seed.run else {}).items():
                found.setdefault(decoding, {})[seed.name] = record
                for domain, share in (record.get("domains") or {}).items():
                    found.setdefault(f"{decoding}, {domain}", {})[seed.name] = share
        columns |= dict.fromkeys(found)
        notes += _notes_on_seeds(row, ())
        lines.append(Line(
            title=row.title, row=row.row, scores={name: evaluation_score(records) for name, records in found.items()},
            printed=group.row(row.row, row.title) if group else None, missing=_missing(row),
            seeds=tuple(seed.name for seed in row.seeds if seed.run and seed.run.final_evaluations()),
        ))  # fmt: skip
    return ResultsTable(
        table=table, setting=setting, title=_title(table, None) + ", evaluations of --eval-data", kind="evaluations",
        columns=tuple(columns), lines=_with_absent(lines, group),
        notes=(EVALUATION_LEGEND, *notes),
    )  # fmt: skip


def column_title(name: str) -> str:
    """What a column is called."""
    return BENCHMARKS[name].title if name in BENCHMARKS else name


def cells(table: ResultsTable) -> Table:
    """The table as text: for each method a row of ours and, beside benchmarks, the paper's."""
    shown = (*table.columns, *((MEAN,) if table.kind == "benchmarks" else ()))
    rows = [("method", "from", *map(column_title, shown))]
    for line in table.lines:
        here = f"here, {len(line.seeds)} seeds" if len(line.seeds) > 1 else "here"
        ours = [score_text(line.scores[name]) if name in line.scores else _blank(line, name) for name in shown]
        rows.append((line.title, here, *ours))
        if table.kind == "benchmarks" and line.printed:
            paper = [line.printed.scores.get(name) for name in table.columns]
            rows.append(("", "paper", *("" if x is None else f"{x:.2f}" for x in paper), f"{line.printed.mean:.2f}"))
    return Table(rows=tuple(rows))


def _blank(line: Line, name: str) -> str:
    return "" if name == MEAN else line.missing


def csv_rows(table: ResultsTable) -> list[dict[str, object]]:
    """One row for each method and column, numbers in percent; an empty cell is a number that does not exist."""
    shown = (*table.columns, *((MEAN,) if table.kind == "benchmarks" else ()))
    return [
        {
            "table": table.table, "setting": table.setting, "kind": table.kind, "row": line.row, "method": line.title,
            "column": name, "status": "measured" if name in line.scores else line.missing,
            **_numbers(line.scores.get(name)), "paper": _printed(line, name),
        }
        for line in table.lines
        for name in shown
    ]  # fmt: skip


def _numbers(score: Score | None) -> dict[str, object]:
    def percent(value: float | None) -> object:
        return "" if value is None else 100 * value

    return {
        "seeds": len(score.by_seed) if score else 0,
        "mean": percent(score.mean if score else None),
        "standard_error_over_questions": percent(score.over_questions if score else None),
        "standard_error_over_seeds": percent(score.over_seeds if score else None),
        "questions": score.num_questions if score else "",
    }


def _printed(line: Line, name: str) -> object:
    if line.printed is None:
        return ""
    return line.printed.mean if name == MEAN else line.printed.scores.get(name, "")
