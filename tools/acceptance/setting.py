"""What a section is told.  Needs no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The options of the command that sections read."""

    device: Literal["cuda", "cpu"]
    tiny: bool
    """Tiny shapes: every line of a section runs, its numbers mean nothing."""
    out: str
    """Directory for files that are worth keeping, such as profiles."""
    sglang_python: str = ""
    """Interpreter of SGLang's environment; empty where there is none."""
    seconds: float = 60.0
    """Time until the section is killed."""

    @property
    def cuda(self) -> bool:
        """Whether the section runs on a GPU."""
        return self.device == "cuda"

    @property
    def real(self) -> bool:
        """Whether goals of speed mean anything: real shapes on a GPU."""
        return self.cuda and not self.tiny

    @property
    def directory(self) -> Path:
        """``out`` as a path."""
        return Path(self.out)

    def to_json(self) -> str:
        """Return the setting as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        """Read what :meth:`to_json` made."""
        return cls(**json.loads(text))
