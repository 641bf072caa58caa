"""The style of the figures: colours, axes, and files that suit a light and a dark page.

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
BLUE, RED, GREEN, PINK, ORANGE, SKY, YELLOW = PALETTE
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# In the SVG these become colours that follow the page, light or dark.
_INK = "#1a1a1b"
_FAINT = "#c8c8c9"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_tropd",  # the same curves give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "path.simplify_threshold": 0.5,
}
_PAGE_COLOURS = (
    "<style>svg{color:#222;--faint:#d5d5d5;--blue:#0072b2}"
    "@media(prefers-color-scheme:dark){svg{color:#ddd;--faint:#444;--blue:#3f9fe3}}"
    'text{font-family:system-ui,"DejaVu Sans",sans-serif}</style>'
)

Series = tuple[list[float], list[float]]
"""Steps and values."""


def new_figure() -> tuple[Figure, Axes]:
    """A figure with one pair of axes, without pyplot: nothing global, no window, no thread."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
    return figure, axes


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write ``name.svg`` (for pages) and ``name.png`` (for everything else)."""
    directory.mkdir(parents=True, exist_ok=True)
    svg, png = directory / f"{name}.svg", directory / f"{name}.png"
    save_svg(figure, svg)
    with mpl.rc_context(_STYLE):
        figure.savefig(png, dpi=144, facecolor="white")
    return [svg, png]


def save_svg(figure: Figure, path: Path) -> None:
    """Write a figure for pages; the same figure gives the same bytes."""
    with mpl.rc_context(_STYLE):
        figure.savefig(path, transparent=True, metadata={"Date": None})
    path.write_text(_with_page_colours(path.read_text(encoding="utf-8")), encoding="utf-8")


def _with_page_colours(svg: str) -> str:
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)").replace(BLUE.lower(), "var(--blue)")
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + _PAGE_COLOURS + svg[start:]


def draw(axes: Axes, series: Series, label: str, index: int = 0) -> None:
    """A line with a marker where points are few; many noisy points get a running mean over a faint line."""
    steps, values = series
    colour = PALETTE[index % len(PALETTE)]
    marker = MARKERS[index % len(MARKERS)] if len(steps) <= 30 else ""
    if len(steps) <= 60:
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    axes.plot(steps, running_mean(values, len(values) // 30), color=colour, linewidth=1.8, label=label)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over a centred window; values that are not finite are left out."""
    half = max(width // 2, 1)
    means = []
    for index in range(len(values)):
        window = [value for value in values[max(index - half, 0) : index + half + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def finish(axes: Axes, title: str, ylabel: str, *, legend: bool = True) -> None:
    """Title, labels and legend."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(ylabel)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10], integer=True))
    if legend:
        add_legend(axes, loc="best")


def add_legend(axes: Axes, **place: Any) -> None:
    """A legend in the colours of the page."""
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, **place)
