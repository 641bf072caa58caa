"""JSON files that a user gives: read with errors that name the file."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def read_json_object(path: str | Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: the file cannot be read; FileNotFoundError where it does not exist.
        ValueError: it is not UTF-8, not JSON, or holds something else than an object; the message names the file.
    """
    path = Path(path)
    data = path.read_bytes()
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError(f"{path} begins with a byte order mark, which JSON forbids; save it as UTF-8 without one")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {shown(value)}; expected a JSON object")
    return value


def shown(value: object) -> str:
    """Return a value of a file as text for a message, shortened where it is long or deep."""
    return reprlib.repr(value)


def culprit(content: Mapping[str, Any], accepted: Callable[[dict[str, Any]], bool]) -> str | None:
    """Return a key that makes ``content`` unacceptable; None if it is not the keys.

    The key is the one without which ``content`` is accepted, or the last of several that are wrong.
    """
    keys = list(content)

    def without(dropped: list[str]) -> dict[str, Any]:
        return {key: value for key, value in content.items() if key not in dropped}

    alone = next((key for key in keys if accepted(without([key]))), None)
    return alone or next((key for count, key in enumerate(keys, 1) if accepted(without(keys[:count]))), None)
