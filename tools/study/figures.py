"""Curves of the study: entropy and gradient norm over the steps, as the paper's Figure 3 shows them."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.ticker import LogLocator, StrMethodFormatter

from megatron_tropd.reporting.report.figure_style import add_legend, draw, finish, new_figure, svg
from tools.study.comparisons import ENTROPY, GRAD_NORM, Condition, Table
from tools.study.results import BLOCK

DRAWN = ("opd", "clip_outlier", "mask_outlier", "fkl_outlier", "tropd", "tropd_floor")
YLABELS = {ENTROPY: "entropy of the student, nats", GRAD_NORM: "gradient norm before clipping"}


def curve_name(condition: Condition, quantity: str) -> str:
    """Name of a figure's file."""
    return f"miniature_{condition.world.lower()}_{quantity}.svg"


def draw_curves(table: Table, condition: Condition, quantity: str, directory: Path) -> Path | None:
    """Draw the mean over seeds of every method that was run; returns the file, or None where there is nothing."""
    figure, axes = new_figure()
    drawn = False
    for index, method in enumerate(DRAWN):
        runs = table.runs(condition, method)
        if not runs:
            continue
        curves = [run.entropy if quantity == ENTROPY else run.grad_norm for run in runs]
        values = [math.fsum(points) / len(points) for points in zip(*curves, strict=True)]
        steps = [(block + 0.5) * BLOCK for block in range(len(values))]
        draw(axes, (steps, values), method, index)
        drawn = True
    if not drawn:
        return None
    if quantity == GRAD_NORM:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    finish(axes, f"{condition.world}, mean of the seeds", YLABELS[quantity], legend=False)
    add_legend(axes, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    path = directory / curve_name(condition, quantity)
    path.write_text(svg(figure), encoding="utf-8")
    return path
