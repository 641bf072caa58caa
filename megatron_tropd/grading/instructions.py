"""The reference of a row that gives instructions: constraints as a JSON text, and whether a response follows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tropd.flag_values import show
from megatron_tropd.grading.constraints import CONSTRAINTS

FORM = '[{"instruction_id": "punctuation:no_comma", "kwargs": {}}, ...]'


class BadReference(ValueError):
    """A reference that no response can be graded by; the message says why, without the row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """One constraint that a response must follow."""

    instruction_id: str
    kwargs: dict[str, Any]


def read_constraints(reference: str) -> list[Constraint]:
    """Return the constraints of a reference, IFEval's ids with their kwargs; kwargs that are null count as absent.

    Raises:
        BadReference: it is not such a list, an id is unknown, or kwargs are missing, unknown or of another type.
    """
    try:
        items = json.loads(reference)
    except (ValueError, RecursionError):
        raise BadReference(f"a list of constraints is not JSON: {show(reference)}; expected {FORM}") from None
    if not isinstance(items, list) or not items:
        raise BadReference(f"constraints are not a list with an entry: {show(reference)}; expected {FORM}")
    return [_constraint(item) for item in items]


def _constraint(item: object) -> Constraint:
    if not isinstance(item, dict) or not isinstance(item.get("kwargs") or {}, dict):
        raise BadReference(f"a constraint is {show(json.dumps(item))}; expected one as in {FORM}")
    name = item.get("instruction_id")
    kind = CONSTRAINTS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise BadReference(
            f"an instruction_id is {show(str(name))}; expected one of IFEval's 25: {', '.join(CONSTRAINTS)}"
        )
    given = {key: value for key, value in (item.get("kwargs") or {}).items() if value is not None}
    # Tables keep a column of integers and nulls as floats.
    kwargs = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in given.items()}
    if kwargs.keys() != kind.kwargs.keys():
        expected = ", ".join(kind.kwargs) or "none"
        raise BadReference(f"{name} has the kwargs {', '.join(map(show, kwargs)) or 'none'}; expected {expected}")
    for key, wanted in kind.kwargs.items():
        if complaint := _complaint(kwargs[key], wanted):
            raise BadReference(f"{name} has {key} {show(json.dumps(kwargs[key]))}; expected {complaint}")
    return Constraint(instruction_id=str(name), kwargs=kwargs)


def _complaint(value: object, wanted: type | tuple[str, ...]) -> str:
    """Return what was expected instead of ``value``; "" if it is fine."""
    if isinstance(wanted, tuple):
        return "" if value in wanted else " or ".join(wanted)
    if wanted is int:
        return "" if type(value) is int and value >= 0 else "a whole number that is not negative"
    if wanted is list:
        fine = isinstance(value, list) and value and all(isinstance(word, str) and word.strip() for word in value)
        return "" if fine else "a list of texts that are not blank"
    return "" if isinstance(value, str) and value.strip() else "a text that is not blank"


def needs_language(constraints: Sequence[Constraint]) -> bool:
    """Return whether any of these detects the language of the response."""
    return any(CONSTRAINTS[constraint.instruction_id].needs_language for constraint in constraints)


def follows(text: str, constraints: Sequence[Constraint], *, lenient: bool) -> bool:
    """Return whether ``text`` follows every constraint: prompt-level accuracy of IFEval, strict or (lenient) loose.

    Loose: each constraint may be followed by the text without its first or last line or both, and without asterisks.
    """
    variants = _variants(text) if lenient else [text]
    return all(
        any(variant.strip() and CONSTRAINTS[one.instruction_id].holds(variant, **one.kwargs) for variant in variants)
        for one in constraints
    )


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    parts = [lines, lines[1:], lines[:-1], lines[1:-1]]
    cut = [text, *("\n".join(part).strip() for part in parts[1:])]
    return [*cut, *(variant.replace("*", "") for variant in cut)]
