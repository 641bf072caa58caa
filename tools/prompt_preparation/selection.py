"""Which rows of the spool are written: no conflicting answers, and as many of each domain as --take says.

The choice depends on the seed and the uids alone, and not on the order in which the rows came: of each domain, the rows
with the smallest hashes of both.
"""

from __future__ import annotations

from array import array
from collections import Counter

import numpy as np

from tools.prompt_preparation.settings import Settings, UsageError
from tools.prompt_preparation.texts import short_hash
from tools.prompt_preparation.writing import Spool

KEPT = 0
CODES = {1: "conflict", 2: "not_taken", 3: "over_max_rows"}
"""Reasons of rows that are not written, by their number in the result."""
_CONFLICT, _NOT_TAKEN, _OVER_MAX_ROWS = CODES


def select(spool: Spool, conflicts: set[int], settings: Settings) -> tuple[np.ndarray, Counter[str]]:
    """Return a code for each row of the spool, [rows] int8, and how many rows each domain had to choose from.

    Raises:
        UsageError: --take names a domain that no row has.
    """
    order, numbers = array("Q"), array("l")
    codes = array("b")
    domains: dict[str, int] = {}
    dropped = conflicts if settings.conflicting_answers == "drop" else set()
    for batch in spool.batches(["uid", "domain"]):
        for uid, domain in zip(batch["uid"].to_pylist(), batch["domain"].to_pylist(), strict=True):
            order.append(short_hash(f"{settings.seed}:{uid}"))
            numbers.append(domains.setdefault(domain, len(domains)))
            codes.append(_CONFLICT if int(uid.partition("-")[0], 16) in dropped else KEPT)
    result, hashes, domain_of = np.array(codes, np.int8), np.array(order, np.uint64), np.array(numbers)
    names = list(domains)
    counts = np.bincount(domain_of[result == KEPT], minlength=len(names)) if names else ()
    available = Counter({name: int(count) for name, count in zip(names, counts, strict=True) if count})
    if settings.take:
        _take(result, hashes, domain_of, domains, settings)
    if settings.max_rows is not None:
        _smallest(result, hashes, result == KEPT, settings.max_rows, _OVER_MAX_ROWS)
    return result, available


def _take(
    result: np.ndarray, hashes: np.ndarray, domain_of: np.ndarray, domains: dict[str, int], settings: Settings
) -> None:
    """Mark what --take does not take: the rows beyond its number, and all of the domains that it does not name."""
    wanted = dict(settings.take)
    if unknown := [name for name in wanted if name not in domains]:
        found = ", ".join(name or "(none)" for name in sorted(domains)) or "none"
        raise UsageError(f"--take: no row is of the domain {', '.join(unknown)}; the domains of the rows are {found}")
    for name, number in domains.items():
        _smallest(result, hashes, (result == KEPT) & (domain_of == number), wanted.get(name, 0), _NOT_TAKEN)


def _smallest(result: np.ndarray, hashes: np.ndarray, among: np.ndarray, count: int, code: int) -> None:
    """Mark with ``code`` all rows of ``among`` but the ``count`` with the smallest hashes."""
    places = np.flatnonzero(among)
    result[places[np.argsort(hashes[places], kind="stable")[count:]]] = code
