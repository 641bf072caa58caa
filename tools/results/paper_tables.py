"""The paper's tables of results and its Figure 1 (arXiv 2606.01249, version 2), row by row, to stand beside ours.

The numbers of Tables 3, 4 and 6 are those of ``megatron_tropd/benchmarks/paper_results.py``; here are the others,
the printed averages, and which names of a row mean which printed row.  Table 2 holds formulas.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from statistics import fmean

from megatron_tropd.benchmarks.paper_results import PAPER

MATH = ("aime24", "aime25", "amc23")
FIVE = (*MATH, "livecodebench_v6", "gpqa_diamond")
_BARS = ("aime25", "livecodebench_v6", "ifbench", "gpqa_diamond")
SEVEN = (*MATH, "gpqa_diamond", "mmlu_redux", "ifbench", "livecodebench_v6")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrintedRow:
    """One printed row, in percent."""

    name: str
    scores: dict[str, float]
    """Benchmark -> percent."""
    mean: float
    """The printed average."""
    aliases: tuple[str, ...] = ()

    def is_named(self, name: str) -> bool:
        """Whether ``name`` means this row; case, spaces and punctuation do not matter."""
        return _plain(name) in {_plain(known) for known in (self.name, *self.aliases)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrintedGroup:
    """The rows of a table that belong to one pair of models."""

    setting: str
    """Name of its directory in a directory of results."""
    student: str
    teacher: str
    rows: tuple[PrintedRow, ...]

    def row(self, *names: str) -> PrintedRow | None:
        """The row that one of these names means, the first name first; None where none does."""
        return next((row for name in names for row in self.rows if row.is_named(name)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrintedTable:
    """One of the paper's tables."""

    title: str
    columns: tuple[str, ...]
    groups: tuple[PrintedGroup, ...]

    def group(self, setting: str) -> PrintedGroup | None:
        """The rows of a setting; None where the table has none of this name."""
        return next((group for group in self.groups if _plain(group.setting) == _plain(setting)), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_ALIASES = {
    "student": ("base", "DS-1.5B", "DeepSeek-Qwen2.5-1.5B", "DeepSeek-R1-Distill-Qwen-1.5B", "Qwen3-SFT-1.7B"),
    "OPD": ("OPD (RKL)", "RKL", "OPD K1"),
    "Entropy OPD 20%": ("Entropy OPD", "entropy"),
    "REOPOLD 2Stage": ("REOPOLD two stage",),
    "FKL": ("Full FKL", "forward KL"),
    "Clip Outlier": ("clip",),
    "Mask Outlier": ("mask",),
    "TrOPD": ("TrOPD FKL",),
    "TrOPD FKL": ("TrOPD",),
    "TrOPD+AOPD": ("TrOPD AOPD",),
}


def _printed(columns: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> tuple[PrintedRow, ...]:
    """Rows whose last number is the printed average."""
    return tuple(
        PrintedRow(
            name=name, scores=dict(zip(columns, values[:-1], strict=True)), mean=values[-1],
            aliases=_ALIASES.get(name, ()),
        )
        for name, values in rows.items()
    )  # fmt: skip


def _known(key: str, means: dict[str, float]) -> tuple[PrintedRow, ...]:
    """Rows of ``PAPER[key]`` with their printed averages."""
    scores = {row.method: row.scores for row in PAPER[key].rows}
    return tuple(
        PrintedRow(name=name, scores=scores[name], mean=mean, aliases=_ALIASES.get(name, ()))
        for name, mean in means.items()
    )


def _group(setting: str, key: str, rows: tuple[PrintedRow, ...]) -> PrintedGroup:
    return PrintedGroup(setting=setting, student=PAPER[key].student, teacher=PAPER[key].teacher, rows=rows)


_STUDENT = {"student": 34.69}
_METHODS_OF_MATH = {
    "student": (28.64, 24.16, 71.01, 41.27),
    "OPD": (35.83, 29.16, 75.39, 46.79),
    "FKL": (0.00, 0.00, 4.21, 1.40),
    "JSD": (37.91, 30.72, 75.07, 47.90),
    "Entropy OPD 20%": (35.52, 29.06, 73.82, 46.13),
    "Clip Outlier": (36.97, 30.83, 75.78, 47.86),
    "Mask Outlier": (37.08, 30.62, 75.46, 47.72),
    "FKL Outlier": (39.16, 29.89, 77.96, 49.00),
    "TrOPD": (38.54, 32.50, 78.51, 49.85),
    "TrOPD Mask": (40.10, 30.41, 75.85, 48.79),
    "TrOPD Clip": (37.39, 31.77, 77.03, 48.73),
    "TrOPD FKL": (38.54, 32.50, 78.51, 49.85),
}
_TABLE_1 = ("student", "OPD", "FKL", "JSD", "Entropy OPD 20%", "Clip Outlier", "Mask Outlier", "FKL Outlier", "TrOPD")
_TABLE_5 = (
    "student", "OPD", "Mask Outlier", "Clip Outlier", "FKL", "FKL Outlier", "TrOPD Mask", "TrOPD Clip", "TrOPD FKL",
)  # fmt: skip


def _of_math(names: tuple[str, ...]) -> tuple[PrintedGroup, ...]:
    rows = _printed(MATH, {name: _METHODS_OF_MATH[name] for name in names})
    return (_group("skywork-math", "math", rows),)


TABLES: dict[str, PrintedTable] = {
    "table1": PrintedTable(title="Methods in mathematics", columns=MATH, groups=_of_math(_TABLE_1)),
    "table3": PrintedTable(
        title="DeepSeek-R1-Distill-Qwen-1.5B, one domain and three", columns=FIVE,
        groups=(
            _group("skywork-math", "math", _known("math", {
                **_STUDENT, "teacher": 58.48, "OPD": 37.11, "EOPD": 38.00, "Entropy OPD 20%": 36.90,
                "REOPOLD 2Stage": 36.89, "REOPOLD": 38.79, "TrOPD": 40.63,
            })),
            _group("skywork-three-domains", "three-domains", (
                *_known("math", _STUDENT),
                *_printed(FIVE, {"teacher": (65.62, 52.81, 91.79, 36.57, 47.22, 58.80)}),
                *_known("three-domains", {"OPD": 32.99, "REOPOLD": 35.58, "TrOPD": 37.61}),
            )),
        ),
    ),
    "table4": PrintedTable(
        title="Qwen3-SFT-1.7B, several domains", columns=SEVEN,
        groups=(_group("qwen3", "qwen3", _known("qwen3", {
            "student": 39.87, "teacher": 73.43, "OPD": 48.29, "EOPD": 48.86, "Entropy OPD 20%": 48.10,
            "REOPOLD": 48.56, "TrOPD": 51.73,
        })),),
    ),
    "table5": PrintedTable(title="Parts of TrOPD in mathematics", columns=MATH, groups=_of_math(_TABLE_5)),
    "table6": PrintedTable(
        title="TrOPD and AOPD", columns=FIVE,
        groups=(_group("skywork-math", "math", _known("math", {
            **_STUDENT, "OPD": 37.11, "AOPD": 39.79, "TrOPD": 40.63, "TrOPD+AOPD": 41.67,
        })),),
    ),
}  # fmt: skip
"""Name of a table's directory -> what the paper prints in it."""


FIGURE_1: tuple[PrintedRow, ...] = tuple(
    PrintedRow(name=name, scores=dict(zip(_BARS, values, strict=True)), mean=fmean(values))
    for name, values in {
        "TrOPD": (44.06, 36.00, 42.18, 35.98),
        "OPD": (40.72, 32.00, 37.07, 29.80),
        "REOPOLD": (42.29, 35.43, 36.05, 30.56),
        "Qwen3-1.7B": (36.45, 28.57, 20.07, 39.52),
    }.items()
)
"""What is printed on the bars of Figure 1, and their mean; Qwen3-1.7B, which nobody distilled here, is in no table."""
FIGURE_1_TABLE = "table4"
