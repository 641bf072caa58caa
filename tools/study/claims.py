"""Claims about the methods, and what the results say of each by a fixed rule.

A claim says that one method has more of something than others have.  It holds where every comparison holds
(``statistics.Difference.verdict``), it does not hold where one is resolved the other way, and else it cannot be told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tools.study.comparisons import ENTROPY, GRAD_NORM, STUDENT, Condition, Table
from tools.study.plan import HARSH_LR, LONG_STEPS, MAIN_WORLDS
from tools.study.results import DECODINGS
from tools.study.statistics import Difference, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim."""

    text: str
    source: str
    pairs: tuple[tuple[str, str], ...]
    """(the one that is claimed to have more, the other)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the results say of a claim."""

    verdict: Verdict
    least: Difference | None = None
    """The comparison that speaks least for it; None if there is none."""
    least_pair: tuple[str, str] | None = None


def _more(first: str, *others: str) -> tuple[tuple[str, str], ...]:
    return tuple((first, other) for other in others)


ACCURACY_CLAIMS = (
    Claim(text="Clip Outlier is better than OPD", source="Tables 1, 5", pairs=_more("clip_outlier", "opd")),
    Claim(text="Mask Outlier is better than OPD", source="Tables 1, 5", pairs=_more("mask_outlier", "opd")),
    Claim(text="FKL Outlier is better than OPD", source="Tables 1, 5", pairs=_more("fkl_outlier", "opd")),
    Claim(
        text="FKL Outlier is better than Clip Outlier and Mask Outlier", source="Tables 1, 5",
        pairs=_more("fkl_outlier", "clip_outlier", "mask_outlier"),
    ),
    Claim(text="FKL alone collapses: OPD is better", source="Tables 1, 5", pairs=_more("opd", "fkl")),
    Claim(
        text="FKL alone collapses, as a detached reward: the untrained student is better",
        source="reading of Table 1", pairs=_more(STUDENT, "fkl_reward"),
    ),
    Claim(text="JSD is better than OPD", source="Table 1", pairs=_more("jsd", "opd")),
    Claim(
        text="Prefixes of the teacher add to FKL Outlier: TrOPD is better", source="Table 5",
        pairs=_more("tropd", "fkl_outlier"),
    ),
    Claim(
        text="Prefixes of the teacher add to Mask Outlier and Clip Outlier", source="Table 5",
        pairs=(("tropd_mask", "mask_outlier"), ("tropd_clip", "clip_outlier")),
    ),
    Claim(text="TrOPD is better than OPD", source="Tables 1, 5", pairs=_more("tropd", "opd")),
    Claim(
        text="TrOPD is the best of its tables", source="Tables 1, 5",
        pairs=_more(
            "tropd", "opd", "fkl", "jsd", "entropy_opd", "clip_outlier", "mask_outlier", "fkl_outlier", "tropd_mask",
            "tropd_clip",
        ),
    ),
)  # fmt: skip
"""The paper's, each judged by every way of decoding."""

OUR_CLAIMS = (
    Claim(text="The reward floor adds to FKL Outlier", source="ours", pairs=_more("tropd_floor", "fkl_outlier")),
    Claim(text="TrOPD with a reward floor is better than OPD", source="ours", pairs=_more("tropd_floor", "opd")),
    Claim(text="Clip and FKL on all tokens is better than OPD", source="ours", pairs=_more("clip_fkl", "opd")),
    Claim(
        text="The forward KL of FKL Outlier must be differentiated: as a detached reward it is worse", source="ours",
        pairs=_more("fkl_outlier", "fkl_outlier_reward"),
    ),
)  # fmt: skip

CURVE_CLAIMS: tuple[tuple[str, Claim], ...] = (
    (ENTROPY, Claim(text="Mask Outlier keeps more entropy than OPD", source="Figure 3a",
                    pairs=_more("mask_outlier", "opd"))),
    (ENTROPY, Claim(text="TrOPD keeps more entropy than OPD", source="Figure 3a", pairs=_more("tropd", "opd"))),
    (GRAD_NORM, Claim(text="OPD has a larger gradient than Clip Outlier, and that than Mask Outlier",
                      source="Figure 3b", pairs=(("opd", "clip_outlier"), ("clip_outlier", "mask_outlier")))),
    (GRAD_NORM, Claim(text="OPD has a larger gradient than TrOPD", source="Figure 3b", pairs=_more("opd", "tropd"))),
)  # fmt: skip

HARSH = Condition(world="B4", lr=HARSH_LR)
LONG = Condition(world="B4", steps=LONG_STEPS)
OTHER_CLAIMS: tuple[tuple[Condition, Claim], ...] = (
    (HARSH, Claim(text="OPD is unstable: the untrained student is better", source="Figure 3",
                  pairs=_more(STUDENT, "opd"))),
    (HARSH, Claim(text="FKL Outlier is better than OPD", source="Tables 1, 5", pairs=_more("fkl_outlier", "opd"))),
    (LONG, Claim(text="TrOPD is better than OPD", source="Tables 1, 5", pairs=_more("tropd", "opd"))),
    (LONG, Claim(text="FKL Outlier is better than OPD", source="Tables 1, 5", pairs=_more("fkl_outlier", "opd"))),
    (LONG, Claim(text="Prefixes of the teacher add to FKL Outlier: TrOPD is better", source="Table 5",
                 pairs=_more("tropd", "fkl_outlier"))),
)  # fmt: skip
"""Those of the larger learning rate and of the longer runs."""

MAIN = tuple(Condition(world=world) for world in MAIN_WORLDS)


def judge(claim: Claim, table: Table, condition: Condition, quantity: str) -> Judgement:
    """Apply the rule to one quantity (a decoding's accuracy, entropy or gradient norm) in one condition."""
    compared = [(pair, table.difference(condition, *pair, quantity)) for pair in claim.pairs]
    found = [(pair, difference) for pair, difference in compared if difference is not None]
    if not found:
        return Judgement(verdict=Verdict.NOT_RUN)
    pair, least = min(found, key=lambda one: _upper(one[1]))
    verdicts = {difference.verdict for _, difference in found}
    verdict = Verdict.OPEN
    if Verdict.OPPOSITE in verdicts:
        verdict = Verdict.OPPOSITE
    elif verdicts == {Verdict.HOLDS}:
        verdict = Verdict.HOLDS if len(found) == len(compared) else Verdict.NOT_RUN
    return Judgement(verdict=verdict, least=least, least_pair=pair if len(claim.pairs) > 1 else None)


def _upper(difference: Difference) -> tuple[bool, float]:
    """Sorts comparisons that are resolved the other way first, then by what can still be the case."""
    return difference.verdict is not Verdict.OPPOSITE, difference.mean - (difference.half_width or 0.0)


def number_of_comparisons() -> int:
    """How many intervals the verdicts rest on, for the page to say so."""

    def pairs(claims: Sequence[Claim]) -> int:
        return sum(len(claim.pairs) for claim in claims)

    by_decoding = pairs((*ACCURACY_CLAIMS, *OUR_CLAIMS)) * len(MAIN) + pairs([claim for _, claim in OTHER_CLAIMS])
    return by_decoding * len(DECODINGS) + pairs([claim for _, claim in CURVE_CLAIMS]) * len(MAIN)
