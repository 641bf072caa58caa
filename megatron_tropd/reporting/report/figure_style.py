"""The style of the figures: colours, axes, and files that suit a light and a dark page.

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_tropd.atomic_files import replacing, write_text

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
BLUE, RED, GREEN, PINK, ORANGE, SKY, YELLOW = PALETTE
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# In the SVG these become colours that follow the page, light or dark.
INK = "#1a1a1b"
_FAINT = "#c8c8c9"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_tropd",  # the same curves give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
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
    """A figure with one pair of axes."""
    figure, (axes,) = new_panels(1, 1, size=(6.4, 3.4))
    return figure, axes


def new_panels(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of axes, row by row, without pyplot: nothing global, no window, no thread."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write ``name.svg`` (for pages) and ``name.png`` (for everything else)."""
    directory.mkdir(parents=True, exist_ok=True)
    path, png = directory / f"{name}.svg", directory / f"{name}.png"
    write_text(path, svg(figure))
    with mpl.rc_context(_STYLE), replacing(png) as temporary:
        figure.savefig(temporary, format="png", dpi=144, facecolor="white")
    return [path, png]


def svg(figure: Figure) -> str:
    """The figure as SVG whose colours suit a light and a dark page."""
    stream = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _with_page_colours(stream.getvalue())


def _with_page_colours(svg: str) -> str:
    svg = svg.replace(INK, "currentColor").replace(_FAINT, "var(--faint)").replace(BLUE.lower(), "var(--blue)")
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
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, **place)
