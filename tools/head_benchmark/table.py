"""Results as markdown, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from megatron_tropd.reporting.report import figure_style

from .measure import Row


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(title: str, rows: Sequence[Row]) -> str:
    """One table; contenders in the order given."""
    lines = [
        f"### {title}",
        "",
        "| contender | loss | error vs float64 | peak MB | bytes per token and column | ms | x three products | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        megabytes = None if row.peak_bytes is None else row.peak_bytes / 1e6
        cells = [
            row.name, row.loss, _number(row.error, ".1e"), _number(megabytes, ",.1f"), _number(row.slope, ".2f"),
            _number(row.milliseconds, ",.1f"), _number(row.ratio, ".2f"), row.note,
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(tables: Sequence[tuple[str, Sequence[Row]]], directory: Path) -> list[Path]:
    """Time over the three products against peak memory, one point per contender and configuration."""
    figure, axes = figure_style.new_figure()
    names = list(dict.fromkeys(row.name for _, rows in tables for row in rows))
    for index, name in enumerate(names):
        points = [
            (row.peak_bytes / 1e6, row.ratio)
            for _, rows in tables
            for row in rows
            if row.name == name and row.peak_bytes and row.ratio
        ]
        if points:
            count = len(figure_style.PALETTE)
            marker = figure_style.MARKERS[(index + index // count) % len(figure_style.MARKERS)]
            colour = figure_style.PALETTE[index % count]
            axes.plot(*zip(*points, strict=True), marker, label=name, color=colour, markersize=8)
    figure_style.finish(axes, "Head and loss: time and memory", "time / three matrix products", legend=False)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("peak memory beyond inputs and gradients, MB")
    axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
    figure_style.add_legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure_style.save(figure, directory, "head_benchmark")


def write(
    directory: Path, hardware: dict[str, Any], tables: Sequence[tuple[str, Sequence[Row]]], absent: dict[str, str]
) -> str:
    """Write ``head_benchmark.md``, ``.json``, ``.svg``, ``.png``; returns the markdown."""
    directory.mkdir(parents=True, exist_ok=True)
    parts = ["Hardware: " + ", ".join(f"{name} {value}" for name, value in hardware.items()) + "\n"]
    parts += [markdown(title, rows) for title, rows in tables]
    if absent:
        parts.append("Not run:\n\n" + "".join(f"- {name}: {reason}\n" for name, reason in absent.items()))
    text = "\n".join(parts)
    (directory / "head_benchmark.md").write_text(text, encoding="utf-8")
    found = [{"title": title, "rows": [asdict(row) for row in rows]} for title, rows in tables]
    (directory / "head_benchmark.json").write_text(
        json.dumps({"hardware": hardware, "tables": found, "absent": absent}, indent=1), encoding="utf-8"
    )
    plot(tables, directory)
    return text
