"""The value that the text of a flag or of a YAML key is.

The text is read in the same way in both places, and gives exactly the value that it says, or an error: no rounding to
infinity or to zero, no octal numbers, no ``no`` for false where a name is expected.
"""

from __future__ import annotations

import math
import re
import sys
import typing
from typing import Any

from megatron_tropd.plain_yaml import Value, Word

_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]{0,18})(\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_SHOWN = 80


def choices_of(kind: Any) -> tuple[str, ...]:
    """Return the values that a Literal, or a union of Literals, allows; () for any other type."""
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) is typing.Union:
        return tuple(word for part in typing.get_args(kind) for word in choices_of(part))
    return ()


def shortened(text: str, limit: int = _SHOWN) -> str:
    """Return ``text``, without its middle if it is longer than ``limit``."""
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"


def show(value: object) -> str:
    """Return ``value`` as messages quote it."""
    return shortened(repr(value))


def _number(text: str, kind: type) -> int | float:
    """Return the number that ``text`` is.

    Raises:
        ValueError: it is not one, or a float cannot hold it.
    """
    if kind is int:
        if not _INTEGER.fullmatch(text):
            reason = "; write it without leading zeros" if re.fullmatch(r"[+-]?0[0-9]+", text) else ""
            raise ValueError(f"{show(text)} is not an integer{reason}")
        return int(text.partition(".")[0])
    if not _NUMBER.fullmatch(text):
        infinite = text.lstrip("+-.").lower() in ("inf", "infinity", "nan")
        raise ValueError(f"{show(text)} is not a {'finite ' if infinite else ''}number")
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{show(text)} is too large for a floating-point number")
    if abs(number) < sys.float_info.min and re.search("[1-9]", re.split("[eE]", text)[0]):
        raise ValueError(f"{show(text)} is too small for a floating-point number")
    return number


def check_text(text: str) -> str:
    """Return ``text``.

    Raises:
        ValueError: it cannot be a path or be written to a file.
    """
    if "\0" in text:
        raise ValueError(f"{show(text)} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{show(text)} is not valid UTF-8 text") from None
    return text


def _coerce(text: str, kind: Any) -> Any:
    """Return the value of type ``kind`` that ``text`` is.

    Raises:
        ValueError: it is not one; the message begins with the text.
    """
    check_text(text)
    if kind is bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise ValueError(f"{show(text)} is not true or false")
        return text.lower() in _TRUE
    if choices := choices_of(kind):
        if text not in choices:
            raise ValueError(f"{show(text)} is not one of {', '.join(choices)}")
        return text
    return text if kind is str else _number(text, kind)


def from_flag(given: Any, kind: Any) -> Any:
    """Return the value of a flag of the command line.

    Raises:
        ValueError: it has none, or not of that type.
    """
    if isinstance(given, bool):
        return given
    words = given if isinstance(given, list) else [given]
    if not words:
        raise ValueError("'--' is no value; give one or leave the flag out")  # argparse drops it
    if "" in words:
        raise ValueError("the value is empty; give one or leave the flag out")
    return [_coerce(word, str) for word in words] if kind == list[str] else _coerce(given, kind)


def from_yaml(given: Value, kind: Any, default: Any) -> Any:
    """Return the value of a key of a YAML file.

    Raises:
        ValueError: it has none, or not of that type.
    """
    words = given if isinstance(given, tuple) else (given,)
    if any(word.is_null for word in words):
        raise ValueError("has no value; give one or leave the line out")
    if kind == list[str]:
        if any(not word.text for word in words):
            raise ValueError("has an empty value; give one or leave it out")
        return [_coerce(word.text, str) for word in words]
    if isinstance(given, tuple):
        raise ValueError(f"has a list of {len(given)}; expected one value")
    if not given.text and default != "":
        raise ValueError("has an empty value; give one or leave the line out")
    return _coerce(given.text, kind)


def words_of_yaml(given: Value) -> tuple[str, ...] | None:
    """Return the words after a flag, from its YAML value: () for true; None for false or no value (no flag).

    Raises:
        ValueError: they cannot be words of a command line, or YAML's readers do not agree what they mean.
    """
    if isinstance(given, Word) and not given.quoted:
        if given.is_null or given.text.lower() == "false":
            return None
        if given.text.lower() == "true":
            return ()
        if given.text.lower() in (*_TRUE, *_FALSE):
            raise ValueError(f"write true or false for a flag without a value, or the word in quotes: '{given.text}'")
    words = given if isinstance(given, tuple) else (given,)
    if not words:
        raise ValueError("has an empty list; write true for a flag without a value")
    if any(word.is_null for word in words):
        raise ValueError("has a list with a missing value; write the word, in quotes if it is empty")
    return tuple(word.text for word in words)
