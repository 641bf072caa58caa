"""Errors that several rooms raise and handle, and their text."""

from __future__ import annotations

import reprlib


class EngineError(RuntimeError):
    """Something that writes or scores tokens cannot do its work, or refuses its input."""


def text_of(error: Exception) -> str:
    """Return the text of an error; a file name of thousands of characters, which the system refuses, is shortened."""
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str) and len(error.filename) > 1000:
        return f"{error.strerror}: {reprlib.repr(error.filename)}"
    return str(error)
