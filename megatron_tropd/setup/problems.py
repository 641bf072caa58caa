"""Complaints about a configuration, collected so that a user sees all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_tropd.cli import ConfigError

T = TypeVar("T")


class Problems:
    """What is wrong, and what deserves a warning."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def attempt(self, call: Callable[[], T]) -> T | None:
        """The value of ``call``, or None and its complaint noted."""
        try:
            return call()
        except ConfigError as error:
            self.errors.extend(error.errors)
        except (ValueError, OSError) as error:
            self.errors.append(str(error))
        return None

    def require(self, condition: object, complaint: str) -> None:
        """Note ``complaint`` unless ``condition`` holds."""
        if not condition:
            self.errors.append(complaint)

    def stop_if_any(self) -> None:
        """End the checks here when later ones would only repeat what is wrong."""
        if self.errors:
            raise ConfigError(self.errors)
