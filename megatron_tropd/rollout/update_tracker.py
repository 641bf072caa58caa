"""Records which tensors of a weight update have arrived.  It keeps no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from megatron_tropd.errors import EngineError

_SHOWN = 5


class UpdateTracker:
    """Enforces that an engine generates only after it received every tensor exactly once.

    Args:
        shapes: HF name -> shape of every tensor the engine may be sent.
        optional: names that may be left out (``lm_head.weight`` of a tied model).
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], optional: frozenset[str] = frozenset()) -> None:
        self._shapes = dict(shapes)
        self._optional = optional
        self._version: int | None = None
        self._pending: int | None = None
        self._received: set[str] = set()
        self._refusal: str | None = "no weights were loaded yet"

    @property
    def version(self) -> int | None:
        """The version that may be served; None while there is none."""
        return self._version

    def begin(self, version: int) -> None:
        """Open an update.  One that was left open or failed is abandoned."""
        self._version, self._pending = None, version
        self._received.clear()
        self._refusal = f"the update to weight version {version} is not finished"

    def receive(self, name: str, shape: tuple[int, ...]) -> None:
        """Check and record one tensor, before it is copied anywhere.

        Raises:
            EngineError: no update is open, or the tensor is unknown, repeated or of another shape.
        """
        if self._pending is None:
            self.fail(f"tensor {name} was sent outside begin_update .. end_update")
        if name not in self._shapes:
            self.fail(f"tensor {name} is unknown to this model; expected HF names such as {sorted(self._shapes)[0]}")
        if name in self._received:
            self.fail(f"tensor {name} was sent twice")
        if tuple(shape) != self._shapes[name]:
            self.fail(f"tensor {name} has shape {tuple(shape)}; expected {self._shapes[name]}")
        self._received.add(name)

    def has(self, name: str) -> bool:
        """Whether this update already received ``name``."""
        return name in self._received

    def end(self, version: int) -> None:
        """Close the update and allow generation.

        Raises:
            EngineError: no update is open, it is of another version, or a tensor is missing.
        """
        if self._pending is None:
            self.fail(f"end_update({version}) without an open update ({self._refusal})")
        if version != self._pending:
            self.fail(f"end_update({version}) closes an update begun as version {self._pending}")
        missing = sorted(self._shapes.keys() - self._received - self._optional)
        if missing:
            self.fail(f"{len(missing)} tensor(s) missing: {', '.join(missing[:_SHOWN])}")
        self._version, self._pending, self._refusal = version, None, None

    def refuse(self, reason: str) -> str:
        """Refuse generation until a complete new update; returns the text of the failure."""
        attempt = "weight update" if self._pending is None else f"update to weight version {self._pending}"
        self._version, self._pending = None, None
        self._received.clear()
        self._refusal = f"the last {attempt} failed: {reason}"
        return attempt

    def fail(self, reason: str) -> NoReturn:
        """:meth:`refuse`, and raise EngineError."""
        raise EngineError(f"{self.refuse(reason)}: {reason}")

    def require_ready(self) -> int:
        """Return the version to generate with.

        Raises:
            EngineError: saying why there is none.
        """
        if self._version is None:
            raise EngineError(f"refusing to generate: {self._refusal}; push a whole set of weights first")
        return self._version
