"""Collect everything that is wrong with a configuration, so that a user sees all of it at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from megatron_tropd.cli import ConfigError
from megatron_tropd.errors import text_of

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
            self.errors.append(text_of(error))
        return None

    def require(self, condition: object, complaint: str) -> None:
        """Note the error ``complaint`` unless ``condition`` holds."""
        if not condition:
            self.errors.append(complaint)

    @contextlib.contextmanager
    def named(self, where: str) -> Iterator[None]:
        """Begin the errors and warnings that are found inside with ``where``, unless that is empty."""
        starts = len(self.errors), len(self.warnings)
        yield
        for found, start in zip((self.errors, self.warnings), starts, strict=True):
            found[start:] = [f"{where}: {text}" if where else text for text in found[start:]]

    def stop_if_any(self) -> None:
        """Raise ConfigError if there are errors, where later checks would only repeat them."""
        if self.errors:
            raise ConfigError(self.errors)
