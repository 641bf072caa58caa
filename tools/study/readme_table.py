"""The table of the study that README shows, between two marks that name the command which writes it."""

from __future__ import annotations

from collections.abc import Sequence

from tools.study.claims import MAIN
from tools.study.comparisons import STUDENT, Table
from tools.study.formatting import markdown, mean_text
from tools.study.methods import METHODS
from tools.study.page_text import DECODING_NAMES
from tools.study.results import DECODINGS, Result

BEGIN = "<!-- written by examples/miniature_study/report.py --readme: begin -->"
END = "<!-- written by examples/miniature_study/report.py --readme: end -->"


class NoPlace(ValueError):
    """A file has no place for the table."""


def readme_table(results: Sequence[Result]) -> str:
    """Accuracies [%] of every method: all decodings in the first world, and the first decoding in the others."""
    table = Table(results)
    first, *others = MAIN
    columns = [(first, decoding) for decoding in DECODINGS] + [(world, DECODINGS[0]) for world in others]
    head = ["", *(f"{condition.world}, {DECODING_NAMES[decoding]}" for condition, decoding in columns)]
    names = {STUDENT: "student before", **{name: f"{METHODS[name].title} (`{name}`)" for name in METHODS}}
    rows = [
        [title, *(mean_text(table.mean(condition, name, decoding)) for condition, decoding in columns)]
        for name, title in names.items()
    ]
    return markdown(head, rows)


def with_table(text: str, results: Sequence[Result]) -> str:
    """``text`` with the table between its marks.

    Raises:
        NoPlace: the marks are not there, once each and in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise NoPlace(f"expected one line {BEGIN!r}, and after it one line {END!r}")
    return f"{before}{BEGIN}\n{readme_table(results)}\n{END}{after}"
