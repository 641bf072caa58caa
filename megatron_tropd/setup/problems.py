"""Collect everything that is wrong with a configuration, so that a user sees all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from megatron_tropd.cli import ConfigError

T = TypeVar("T")


class Problems:
    """The errors and warnings found so far."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def attempt(self, call: Callable[[], T]) -> T | None:
        """Return the value of ``call``, or None with its ConfigError, ValueError or OSError noted."""
        try:
            return call()
        except ConfigError as error:
            self.errors.extend(error.errors)
        except (ValueError, OSError) as error:
            self.errors.append(str(error))
        return None

    def require(self, condition: object, complaint: str) -> None:
        """Note the error ``complaint`` unless ``condition`` holds."""
        if not condition:
            self.errors.append(complaint)

    def stop_if_any(self) -> None:
        """Raise ConfigError if there are errors, where later checks would only repeat them."""
        if self.errors:
            raise ConfigError(self.errors)
