"""How figures look: colours, axes, and files that suit a light and a dark page.

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
BLUE, RED, GREEN, PINK, ORANGE, SKY, YELLOW = PALETTE
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

# Two marker values: in the SVG they become the colours of the page.
_INK = "#1a1a1b"
_FAINT = "#c8c8c9"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron_tropd",  # the same curves give the same file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "path.simplify_threshold": 0.5,
}
_PAGE_COLOURS = (
    "<style>svg{color:#222;--faint:#d5d5d5}"
    "@media(prefers-color-scheme:dark){svg{color:#ddd;--faint:#444}}"
    'text{font-family:system-ui,"DejaVu Sans",sans-serif}</style>'
)

Series = tuple[list[float], list[float]]
"""Steps and values."""


def new_figure(rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with axes below each other, without pyplot: nothing global, no window, no thread."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.0 * rows + 0.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0].tolist()
    return figure, axes


def save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Write ``name.svg`` (for pages) and ``name.png`` (for everything else)."""
    directory.mkdir(parents=True, exist_ok=True)
    svg, png = directory / f"{name}.svg", directory / f"{name}.png"
    with mpl.rc_context(_STYLE):
        figure.savefig(svg, transparent=True, metadata={"Date": None})
        figure.savefig(png, dpi=144, facecolor="white")
    svg.write_text(_with_page_colours(svg.read_text(encoding="utf-8")), encoding="utf-8")
    return [svg, png]


def _with_page_colours(svg: str) -> str:
    svg = svg.replace(_INK, "currentColor").replace(_FAINT, "var(--faint)")
    start = svg.index(">", svg.index("<svg")) + 1
    return svg[:start] + _PAGE_COLOURS + svg[start:]


def draw(axes: Axes, series: Series, label: str, index: int = 0) -> None:
    """A line with a marker where points are few; many noisy points get a running mean over a faint line."""
    steps, values = series
    colour = PALETTE[index % len(PALETTE)]
    marker = MARKERS[index % len(MARKERS)] if len(steps) <= 30 else ""
    if len(steps) <= 60:
        axes.plot(steps, values, color=colour, marker=marker, markersize=4, label=label)
        return
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.9)
    axes.plot(steps, running_mean(values, len(values) // 30), color=colour, label=label)


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean over a centred window; what is not finite is left out of it."""
    half = max(width // 2, 1)
    means = []
    for index in range(len(values)):
        window = [value for value in values[max(index - half, 0) : index + half + 1] if math.isfinite(value)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def finish(axes: Axes, title: str, ylabel: str, *, legend: bool = True, last: bool = True) -> None:
    """Title, labels and legend."""
    axes.set_title(title)
    axes.set_ylabel(ylabel)
    if last:
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    if legend and len(axes.get_legend_handles_labels()[1]) > 0:
        axes.legend(loc="best")
