"""The methods of the study, by the names of the rows of the paper's tables, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Flags = Mapping[str, str]
"""Name of a flag of the training command without its dashes -> value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A row of the study's tables."""

    title: str
    source: str
    """Tables of the paper that have the row; what it is a reading of; or that it is ours."""
    flags: Flags = field(default_factory=dict)
    """Flags that differ from those that all methods share."""


def _of(objective: str, title: str, source: str, **flags: str) -> Method:
    named = {name.replace("_", "-"): value for name, value in flags.items()}
    return Method(title=title, source=source, flags={"objective": objective, **named})


METHODS: dict[str, Method] = {
    "opd": _of("opd", "OPD", "Tables 1, 5"),
    "fkl": _of("fkl", "FKL", "Tables 1, 5"),
    "fkl_reward": _of(
        "fkl_reward", "FKL as a reward", "reading of FKL", fkl_support="renorm", fkl_logprob_min="-10"
    ),
    "jsd": _of("jsd", "JSD", "Table 1"),
    "entropy_opd": _of("entropy_opd", "Entropy OPD 20%", "Table 1"),
    "clip_outlier": _of("clip_outlier", "Clip Outlier", "Tables 1, 5"),
    "mask_outlier": _of("mask_outlier", "Mask Outlier", "Tables 1, 5"),
    "fkl_outlier": _of("fkl_outlier", "FKL Outlier (TrOPD without guidance)", "Tables 1, 5"),
    "fkl_outlier_reward": _of(
        "fkl_outlier", "FKL Outlier as a reward", "reading of FKL Outlier",
        fkl_grad="reward", fkl_support="renorm", fkl_logprob_min="-10",
    ),
    "tropd": _of("tropd", "TrOPD", "Tables 1, 5"),
    "tropd_mask": _of("tropd_mask", "TrOPD Mask", "Table 5"),
    "tropd_clip": _of("tropd_clip", "TrOPD Clip", "Table 5"),
    "tropd_official": _of("tropd_official", "TrOPD, as reported of its code", "reading of TrOPD"),
    "tropd_floor": _of("tropd_floor", "TrOPD with a reward floor", "ours"),
    "clip_fkl": _of("clip_fkl", "Clip and FKL on all tokens", "ours"),
}  # fmt: skip
"""Name in results and flags -> the method."""
