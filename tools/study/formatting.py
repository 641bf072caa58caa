"""Numbers and tables as the study's pages show them."""

from __future__ import annotations

from collections.abc import Sequence

from tools.study.statistics import Difference, Mean


def mean_text(value: Mean | None, digits: int = 1) -> str:
    """A mean with its standard error in parentheses."""
    if value is None:
        return "not run"
    error = "" if value.standard_error is None else f" ({value.standard_error:.{digits}f})"
    return f"{value.mean:.{digits}f}{error}"


def difference_text(value: Difference, digits: int = 1) -> str:
    """A paired difference with its interval, and in how many seeds it is above 0."""
    interval = ""
    if value.half_width is not None:
        low, high = value.mean - value.half_width, value.mean + value.half_width
        interval = f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{value.mean:+.{digits}f}{interval}, {value.above}/{value.seeds}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
