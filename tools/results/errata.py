"""Where the paper contradicts itself in its tables and in what its text says of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Erratum:
    """One inconsistency."""

    place: str
    printed: str
    comment: str
    tables: tuple[str, ...]
    """Tables of results that it bears on."""


ERRATA: tuple[Erratum, ...] = (
    Erratum(
        place="Tables 3 and 6, TrOPD, AMC 23", printed="77.03",
        comment="Tables 1 and 5 print 78.51; 77.03 is also what Table 5 prints for TrOPD Clip. The average 40.63 "
        "belongs to 77.03 (with 78.51 it is 40.93), the gains in mathematics of the text (+3.06, +1.99) to 78.51.",
        tables=("table1", "table3", "table5", "table6"),
    ),
    Erratum(
        place="Section 5.2, TrOPD over OPD in general domains", printed="+2.63",
        comment="In Table 3, LiveCodeBench and GPQA rise by 4.96 on average; 2.63 is TrOPD over EOPD in the average of "
        "all five columns.",
        tables=("table3",),
    ),
    Erratum(
        place="Section 5.2, TrOPD over REOPOLD in general domains", printed="+1.84",
        comment="1.84 is the difference of the averages of all five columns; in LiveCodeBench and GPQA it is 2.37.",
        tables=("table3",),
    ),
    Erratum(
        place="Section 1, TrOPD over OPD in mathematics", printed="+3.34",
        comment="That is AIME 25 alone; the mean of the three sets is +2.88.",
        tables=("table4",),
    ),
    Erratum(
        place="Table 4, teacher, GPQA", printed="58.86",
        comment="No share of 198 questions asked 4 times, and equal to the LiveCodeBench of the same row: a copy.",
        tables=("table4",),
    ),
    Erratum(
        place="Section 5.2, teacher of the three domains", printed="Skywork-OR1-Math-7B",
        comment="The caption of Table 3 and Section 5.1 say Skywork-OR1-7B.",
        tables=("table3",),
    ),
    Erratum(
        place="Tables 1 and 5, formulas of FKL and JSD",
        printed="the sum of pi_T log(pi_T / pi_S), beside log(pi_T / pi_S)",
        comment="The first is a loss, the second a reward; as a reward the sum has the other sign, as in Table 2.",
        tables=("table1", "table5"),
    ),
    Erratum(
        place="Table 3, REOPOLD", printed="36.97, 30.83, 75.78",
        comment="The same numbers as Clip Outlier of Tables 1 and 5: here REOPOLD is its clipping alone, and the row "
        "REOPOLD 2Stage the whole method.",
        tables=("table1", "table3", "table5"),
    ),
    Erratum(
        place="Table 4, MMLU-Redux", printed="among STEM",
        comment="It is about general knowledge; its values are no shares of the set's 5700 questions.",
        tables=("table4",),
    ),
)  # fmt: skip


def errata_of(table: str) -> list[Erratum]:
    """The inconsistencies that bear on a table."""
    return [erratum for erratum in ERRATA if table in erratum.tables]
