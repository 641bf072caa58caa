"""The curves of several runs in one plot: one figure a group of metrics, one panel a metric, one line a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_tropd.reporting.metric_names import METRICS
from megatron_tropd.reporting.records import of_kind
from megatron_tropd.reporting.report import figure_style as style
from megatron_tropd.reporting.report.plots import series
from tools.results.compare_input import NamedRun
from tools.results.figures import literal

EVALUATION = "eval"
MOST_POINTS = 300
"""Of a line; longer runs are averaged over groups of steps, so that the page stays small."""
_COLUMNS = 3
_WIDTH = 12.0
"""Inches, of every figure, so that all have letters of one size on the page."""
_LINE_STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


def groups(runs: Sequence[NamedRun]) -> dict[str, list[str]]:
    """Group -> its metrics, all that any run has: evaluations first, then in the order of ``docs/metrics.md``."""
    names = {name for named in runs for name in named.metrics()}
    order = {name: index for index, name in enumerate(METRICS)}
    found: dict[str, list[str]] = {EVALUATION: []}
    for name in sorted(names, key=lambda name: (order.get(name, len(order)), name)):
        found.setdefault(name.partition("/")[0], []).append(name)
    return {group: members for group, members in found.items() if members}


def figure(runs: Sequence[NamedRun], names: Sequence[str]) -> Figure:
    """One panel for each metric, with a line for each run that has it."""
    columns = min(_COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    legend = 0.25 * math.ceil(len(runs) / 3)
    made, panels = style.new_panels(rows, columns, size=(_WIDTH, 2.6 * rows + legend))
    for axes in panels[len(names) :]:
        axes.remove()
    lines: dict[str, Line2D] = {}
    for axes, name in zip(panels, names, strict=False):
        for index, named in enumerate(runs):
            points = curve(named, name)
            if points[0]:
                lines[named.name] = _draw(axes, points, index)
        _finish(axes, name)
    made.legend(
        list(lines.values()), [literal(_short(name)) for name in lines], loc="outside upper left", ncols=3,
        frameon=False, fontsize=9, labelcolor=style.INK,
    )  # fmt: skip
    return made


def _draw(axes: Axes, points: style.Series, index: int) -> Line2D:
    style.draw(axes, points, "", index)
    line = axes.lines[-1]
    line.set_linestyle(_LINE_STYLES[index // len(style.PALETTE) % len(_LINE_STYLES)])
    return line


def _finish(axes: Axes, name: str) -> None:
    unit = METRICS[name].unit if name in METRICS else "share right" if name.startswith(f"{EVALUATION}/") else ""
    style.finish(axes, literal(_short(name)), unit, legend=False)
    finite = [value for line in axes.lines for value in map(float, np.asarray(line.get_ydata())) if value > 0]
    if name == "train/grad_norm" and finite and max(finite) > 100 * min(finite):
        axes.set_yscale("log")


def curve(named: NamedRun, name: str) -> style.Series:
    """Steps and values of a metric or of ``eval/DECODING``, at most ``MOST_POINTS``."""
    decoding = name.removeprefix(f"{EVALUATION}/")
    if decoding != name and decoding in named.run.final_evaluations():
        points = [record for record in of_kind(named.run.records, "eval") if record["decoding"] == decoding]
        return [record["step"] for record in points], [float(record["accuracy"]) for record in points]
    return thinned(series(named.run.records, name))


def thinned(points: style.Series) -> style.Series:
    """Means over groups of neighbouring steps; a group without a finite value stays a gap."""
    steps, values = points
    size = math.ceil(len(steps) / MOST_POINTS)
    if size <= 1:
        return points
    starts = range(0, len(steps), size)
    return [fmean(steps[start : start + size]) for start in starts], [
        _mean(values[start : start + size]) for start in starts
    ]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def _short(name: str, most: int = 40) -> str:
    """Both ends of a long name: runs often differ in the last letters."""
    return name if len(name) <= most else f"{name[: most // 2 - 2]}...{name[-(most // 2 - 1) :]}"
