"""Fields of the configuration's dataclasses: a default and the text of ``--help``."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def setting(default: Any, help: str) -> Any:
    """Return a field with a default and the sentence that ``--help`` prints."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})
