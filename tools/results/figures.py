"""The paper's Figure 1 (bars of scores) and Figure 3 (entropy and gradient norm over steps), from our runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_tropd.benchmarks.statistics import estimate
from megatron_tropd.reporting.report import figure_style as style
from megatron_tropd.reporting.report.plots import series
from tools.results.paper_tables import FIGURE_1, FIGURE_1_TABLE, PrintedRow
from tools.results.tables import Line, ResultsTable, column_title
from tools.results.tree import Row

FIGURE_3 = {
    "entropy": ("student/entropy", "Entropy of the student", "nats per token"),
    "grad_norm": ("train/grad_norm", "Gradient norm before clipping", "L2 norm"),
}
"""Part of Figure 3 -> metric, title, label of its axis."""


def figure_1(table: ResultsTable) -> Figure | None:
    """Bars of the scores, one panel a benchmark, with standard errors; a diamond is the paper's number.

    The error is over seeds where there are several, else over questions.  For Table 4 the benchmarks and the methods
    are those of the paper's figure.  None where nothing was measured.
    """
    lines, columns = _chosen(table)
    columns = [name for name in columns if any(name in line.scores for line in lines)]
    if not columns:
        return None
    figure, panels = style.new_panels(1, len(columns), size=(max(2.2, 0.5 * len(lines)) * len(columns), 3.4))
    for axes, name in zip(panels, columns, strict=True):
        _bars(axes, lines, name, paper=_paper(table, lines, name))
        axes.set_title(column_title(name), loc="left", fontsize=10, fontweight="bold")
    panels[0].set_ylabel("score (%)")
    return figure


def _chosen(table: ResultsTable) -> tuple[list[Line], list[str]]:
    """Methods and columns of the bars: those of the paper's figure where it is the same table, else what was run."""
    if table.kind == "benchmarks" and table.table == FIGURE_1_TABLE:
        return [_line_of_figure(table, printed) for printed in FIGURE_1], list(FIGURE_1[0].scores)
    return [line for line in table.lines if line.scores], list(table.columns)


def _line_of_figure(table: ResultsTable, printed: PrintedRow) -> Line:
    found = (line for line in table.lines if any(map(printed.is_named, (line.row, line.title))))
    line = next(found, None) or Line(title=printed.name, row="", scores={}, printed=None)
    return replace(line, printed=printed)


def _paper(table: ResultsTable, lines: Sequence[Line], name: str) -> list[float | None]:
    if table.kind != "benchmarks":
        return [None] * len(lines)
    return [line.printed.scores.get(name) if line.printed else None for line in lines]


def _bars(axes: Axes, lines: Sequence[Line], name: str, paper: Sequence[float | None]) -> None:
    """One panel: a bar for each method, empty where it was not measured."""
    for place, line in enumerate(lines):
        if (score := line.scores.get(name)) is None:
            axes.annotate(line.missing, (place, 0), rotation=90, fontsize=7, ha="center", va="bottom")
            continue
        error = score.over_seeds if score.over_seeds is not None else score.over_questions
        axes.bar(
            place, 100 * score.mean, 0.7, color=style.PALETTE[place % len(style.PALETTE)], linewidth=0,
            yerr=None if error is None else 100 * error,
            error_kw={"elinewidth": 1.0, "capsize": 2, "ecolor": style.INK},
        )  # fmt: skip
    points = [(place, value) for place, value in enumerate(paper) if value is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True), "D", color="white", markeredgecolor=style.INK, markersize=5, label="paper"
        )
        style.add_legend(axes, loc="best")
    names = [line.title if len(line.title) <= 24 else f"{line.title[:21]}..." for line in lines]
    axes.set_xticks(range(len(lines)), [literal(text) for text in names], rotation=35, ha="right", fontsize=8)
    axes.set_xlim(-0.6, len(lines) - 0.4)
    axes.set_ylim(bottom=0)


def literal(text: str) -> str:
    """Text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def figure_3(rows: Sequence[Row], part: str) -> Figure | None:
    """One metric over steps, a line a method: the mean over its seeds, in a band of one standard error over them.

    Args:
        rows: methods of one table and setting.
        part: key of ``FIGURE_3``.
    """
    metric, title, label = FIGURE_3[part]
    lines = {row.title: [series(seed.run.records, metric) for seed in row.seeds if seed.run] for row in rows}
    lines = {name: [one for one in found if one[0]] for name, found in lines.items()}
    lines = {name: found for name, found in lines.items() if found}
    if not lines:
        return None
    figure, axes = style.new_figure()
    highest, lowest = 0.0, math.inf
    for index, (name, found) in enumerate(lines.items()):
        steps, means, errors = over_seeds(found)
        style.draw(axes, (steps, means), literal(name), index)
        if index >= len(style.PALETTE):  # a colour for the second time
            axes.lines[-1].set_linestyle("--")
        if any(error > 0 for error in errors):
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(
                steps, low, high, color=style.PALETTE[index % len(style.PALETTE)], alpha=0.15, linewidth=0
            )
        finite = [value for value in means if value > 0]
        highest, lowest = max([highest, *finite]), min([lowest, *finite])
    if part == "grad_norm" and highest > 100 * lowest:
        axes.set_yscale("log")
    style.finish(axes, title, label)
    return figure


def over_seeds(found: Sequence[style.Series]) -> tuple[list[float], list[float], list[float]]:
    """Steps, mean over the seeds that have a finite value there, and standard error (0 for a single one)."""
    values: dict[float, list[float]] = {}
    for steps, numbers in found:
        for step, number in zip(steps, numbers, strict=True):
            values.setdefault(step, [])
            if math.isfinite(number):
                values[step].append(number)
    ordered = sorted(values)
    means = [fmean(values[step]) if values[step] else math.nan for step in ordered]
    errors = [_error(values[step]) for step in ordered]
    return ordered, means, errors


def _error(values: Sequence[float]) -> float:
    return (estimate([[value] for value in values]).standard_error or 0.0) if values else 0.0


def figure_3_names(table: ResultsTable) -> dict[str, str]:
    """Part of Figure 3 -> name of its file, one for all tables of a setting."""
    return {part: f"figure3_{part}_{table.place}" for part in FIGURE_3}


def save_figures(tables: Sequence[ResultsTable], rows: Sequence[Row], directory: Path) -> list[Path]:
    """Write every figure that has data as SVG and PNG; returns the paths."""
    made: dict[str, Figure | None] = {f"figure1_{table.name}": figure_1(table) for table in tables}
    for table in tables:
        mine = [row for row in rows if (row.table, row.setting) == (table.table, table.setting)]
        made |= {name: figure_3(mine, part) for part, name in figure_3_names(table).items() if name not in made}
    paths: list[Path] = []
    for name, figure in made.items():
        if figure is not None:
            paths += style.save(figure, directory, name)
    return paths
