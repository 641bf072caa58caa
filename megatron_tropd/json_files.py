"""JSON files: read with errors that name the file, and taken apart with errors that name the field.

:func:`as_dataclass` is the schema of the files that this project writes: the types of a dataclass's fields say what a
file has to hold.  No value is converted to make it fit.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MAX_WHOLE = 2**63 - 1
MAYBE_INFINITE = "may be infinite"
"""``Annotated[float, MAYBE_INFINITE]``: a number that may be -Infinity or Infinity."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 8
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_object(path: str | Path, *, strict: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: the file.
        strict: refuse a key that is given twice and text that is not Unicode; for files that this project wrote.

    Raises:
        OSError: the file cannot be read; FileNotFoundError where it does not exist.
        ValueError: it is not UTF-8, not JSON, or holds something else than an object; the message names the file.
    """
    path = Path(path)
    data = path.read_bytes()
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{path} begins with a byte order mark, which JSON forbids; save it as UTF-8 without one")
    try:
        return parse_json_object(data.decode("utf-8"), str(path), strict=strict)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def parse_json_object(text: str, where: str, *, strict: bool = True) -> dict[str, Any]:
    """Return the object in a JSON text.  ``where`` is what it is called in messages; ``strict`` as above.

    Raises:
        ValueError: it is not JSON, or holds something else than an object; the message begins with ``where``.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique if strict else None)
        if strict and _ESCAPED_SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where} is not valid JSON: a text in it has a lone surrogate") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {shown(value)}; expected a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} is given twice")
    return value


def shown(value: object) -> str:
    """Return a value of a file or an answer as text for a message, shortened where it is long or deep."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write integers of thousands of digits
        return f"a very long {type(value).__name__}"


def printable(name: object) -> str:
    """Return a name that stands in a file as text for a message: as it is, unless a terminal would not show that."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= 300 else shown(name)


def names_shown(names: Iterable[str], most: int = 5) -> str:
    """Return names of a file as text for a message: the first few, quoted, and the number of the rest."""
    listed = sorted(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(shown(name) for name in listed[:most]) + rest


def whole_number(value: object, what: str, low: int = 0, high: int = MAX_WHOLE) -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``.

    Raises:
        ValueError: it is not; the message begins with ``what``.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}; expected a whole number from {low} to {high}")
    return value


def finite_number(value: object, what: str, *, infinite: bool = False) -> float:
    """Return ``value`` if it is a number that a float can hold; with ``infinite``, also an infinity.

    Raises:
        ValueError: it is not; the message begins with ``what``.
    """
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if isinstance(value, float) or abs(value) < 2**1023 else math.nan
    if math.isnan(number) or (math.isinf(number) and not infinite):
        raise ValueError(f"{what} is {shown(value)}; expected a {'' if infinite else 'finite '}number")
    return number


def as_dataclass(cls: type[T], value: object, where: str) -> T:
    """Return the dataclass that an object of a JSON file describes.

    A field may be a bool, an int from 0 on, a float, a str, a Literal, a dataclass, a tuple, list or mapping by text of
    these, a union of them, or Any.  A field with a default may be missing; a key that is no field is an error.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message begins with ``where`` and names it.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {shown(value)}; expected an object")
    hints, needed = _fields(typing.cast(typing.Hashable, cls))
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"{where} has {names_shown(unknown)}; expected only {', '.join(hints)}")
    if missing := needed - value.keys():
        raise ValueError(f"{where} has no {', '.join(sorted(missing))}")
    found = {name: _typed(hints[name], entry, f"{where}: {name}") for name, entry in value.items()}
    try:
        return cls(**found)
    except ValueError as error:  # what the dataclass itself refuses
        raise ValueError(f"{where}: {error}") from error


@functools.cache
def _fields(cls: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the types of a dataclass's fields by name, and the names of those without a default."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    return {field.name: hints[field.name] for field in fields}, frozenset(needed)


def _typed(kind: Any, value: object, what: str) -> Any:
    """Return ``value`` as a value of type ``kind``.

    Raises:
        ValueError: it is none; the message begins with ``what``.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is typing.Annotated:
        return finite_number(value, what, infinite=MAYBE_INFINITE in args)
    if origin in (typing.Union, types.UnionType):
        return _one_of(args, value, what)
    if dataclasses.is_dataclass(kind):
        return as_dataclass(typing.cast(type, kind), value, what)
    if kind is int:
        return whole_number(value, what)
    if kind is float:
        return finite_number(value, what)
    if kind in (str, bool):
        return _checked(isinstance(value, kind), value, what, "text" if kind is str else "true or false")
    if origin is typing.Literal:
        good = isinstance(value, str | int) and not isinstance(value, bool) and value in args
        return _checked(good, value, what, " or ".join(map(repr, args)))
    if origin in (tuple, list):
        entries: Any = _checked(isinstance(value, list | tuple), value, what, "a list")
        return origin(_typed(args[0], entry, f"{what}[{index}]") for index, entry in enumerate(entries))
    assert isinstance(origin, type) and issubclass(origin, Mapping), f"{kind} is not supported"
    named: Any = _checked(isinstance(value, Mapping), value, what, "an object")
    return {key: _typed(args[1], entry, f"{what}[{shown(key)}]") for key, entry in named.items()}


def _checked(good: bool, value: object, what: str, expected: str) -> Any:
    if not good:
        raise ValueError(f"{what} is {shown(value)}; expected {expected}")
    return value


def _one_of(kinds: Iterable[Any], value: object, what: str) -> Any:
    """Return ``value`` as the first of several types that it fits; what is wrong is said of the first but None."""
    if value is None and type(None) in kinds:
        return None
    reasons = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _typed(kind, value, what)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[0] if len(reasons) == 1 else f"{what} is {shown(value)}; {_expectations(reasons)}")


def _expectations(reasons: list[str]) -> str:
    return "expected " + " or ".join(reason.rpartition("; expected ")[2] for reason in reasons)


def culprit(content: Mapping[str, Any], accepted: Callable[[dict[str, Any]], bool]) -> str | None:
    """Return a key that makes ``content`` unacceptable; None if it is not the keys.

    The key is the one without which ``content`` is accepted, or the last of several that are wrong.
    """
    keys = list(content)

    def without(dropped: list[str]) -> dict[str, Any]:
        return {key: value for key, value in content.items() if key not in dropped}

    alone = next((key for key in keys if accepted(without([key]))), None)
    return alone or next((key for count, key in enumerate(keys, 1) if accepted(without(keys[:count]))), None)
