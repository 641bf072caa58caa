"""Fields of the configuration's dataclasses: a default and the text of ``--help``."""

from __future__ import annotations

from dataclasses import field
from typing import Any

BY_ROLE = "GPUs by role"
"""Group of ``--help`` for the flags, of whichever section, that share out ranks and GPUs."""


def setting(default: Any, help: str, *, group: str = "") -> Any:
    """Return a field with a default and the sentence that ``--help`` prints, in ``group`` or that of its section."""
    metadata = {"help": help, "group": group}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
