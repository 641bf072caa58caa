"""The values of a row by key, and the checks of plain values."""

from __future__ import annotations

import math

from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.reading.rows import Row, kind_of, show

MAX_UID = 1 << 43
"""Uids are below this: rng.sample_uid shifts a uid left by 20 bits and the result must fit an int64."""
_MAX_NAME = 256


class Missing:
    """The type of :data:`MISSING`."""


MISSING = Missing()
"""What :func:`lookup` returns where the row does not have the key."""


def lookup(row: Row, key: str) -> object:
    """Return the value of ``key``, or MISSING.

    A key that the row has as it is written wins; otherwise its parts between dots are keys of nested objects or
    numbers of list elements.
    """
    if not key:
        return MISSING
    if key in row.value:
        return row.value[key]
    value: object = row.value
    for part in key.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def check_characters(text: str, what: str, flag: str) -> None:
    """Raise Fault if ``text`` has characters that no text has."""
    if (at := text.find("\0")) >= 0:
        raise Fault(f"{what} with a NUL character at index {at}", "text without NUL", flag)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Fault(f"{what} with a lone surrogate at index {error.start}", "valid Unicode text", flag) from None


def check_text(text: object, what: str, flag: str, expected: str = "a string") -> str:
    """Return ``text``; raise Fault unless it is a non-blank string without NUL characters or lone surrogates."""
    if not isinstance(text, str):
        raise Fault(f"{what} is {kind_of(text)}", expected, flag)
    if not text.strip():
        raise Fault(f"{what} is {'only whitespace' if text else 'empty'}", "text", flag)
    check_characters(text, what, flag)
    return text


def plain_value(value: object, what: str, flag: str) -> str | None:
    """Return a string, or a finite number as a string; None if the value is missing."""
    if value is None or isinstance(value, Missing):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Fault(f"{what} is {kind_of(value)}", "a string, a number or null", flag)
    if isinstance(value, float) and not math.isfinite(value):
        raise Fault(f"{what} is {value}", "a string, a finite number or null", flag)
    text = str(value)
    check_characters(text, what, flag)
    return text


def read_uid(value: object) -> int | str | None:
    """Return the uid of a row: an integer, or a text that names the row, or None where it has none."""
    if value is None or isinstance(value, Missing):
        return None
    if isinstance(value, str):
        if not value or len(value) > _MAX_NAME:
            raise Fault(f"uid {show(value)}", f"an integer, or a text of 1 to {_MAX_NAME} characters", "--uid-key")
        check_characters(value, "uid", "--uid-key")
        return value
    if isinstance(value, bool) or not isinstance(value, int):
        raise Fault(f"uid is {kind_of(value)}", "an integer, a text or null", "--uid-key")
    if not 0 <= value < MAX_UID:
        raise Fault(f"uid {show(value)}", f"an integer in [0, {MAX_UID})", "--uid-key")
    return value
