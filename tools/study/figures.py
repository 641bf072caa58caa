"""Curves of the study: entropy and gradient norm over the steps, as the paper's Figure 3 shows them."""

from __future__ import annotations

import math
from pathlib import Path

from megatron_tropd.reporting.report.figure_style import draw, finish, new_figure, save_svg
from tools.study.comparisons import ENTROPY, GRAD_NORM, Condition, Table
from tools.study.methods import METHODS
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
        draw(axes, (steps, values), METHODS[method].title, index)
        drawn = True
    if not drawn:
        return None
    if quantity == GRAD_NORM:
        axes.set_yscale("log")
    finish(axes, f"{condition.world}, learning rate {condition.lr:g}, mean of the seeds", YLABELS[quantity])
    path = directory / curve_name(condition, quantity)
    save_svg(figure, path)
    return path
