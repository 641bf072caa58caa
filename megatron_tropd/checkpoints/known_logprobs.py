"""``known_logprobs.json`` of a converted checkpoint: what transformers' model gives a few short sequences.

A model that is loaded from the checkpoint, in whatever layout, has to give them the same log-probabilities.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from megatron_tropd.checkpoints.directory import find_checkpoint
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.json_files import MAYBE_INFINITE, as_dataclass, read_json_object

KNOWN_LOGPROBS_JSON = "known_logprobs.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownLogprobs:
    """Token sequences and the log-probability [nats] of every token but the first, over the model's own vocabulary."""

    sequences: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[Annotated[float, MAYBE_INFINITE], ...], ...]

    def __post_init__(self) -> None:
        lengths = [len(sequence) - 1 for sequence in self.sequences]
        if not lengths or min(lengths) < 1 or lengths != [len(logprobs) for logprobs in self.logprobs]:
            raise ValueError("expected sequences of two tokens or more, with a log-probability of every token but one")

    def to_json(self) -> str:
        """Return the text of ``known_logprobs.json``."""
        return json.dumps(asdict(self)) + "\n"

    def mean_difference(self, found: Sequence[Sequence[float]]) -> float:
        """Return the mean absolute difference [nats] of ``found`` over all tokens; NaN or inf where a value is."""
        pairs = [
            (known, other)
            for ours, theirs in zip(self.logprobs, found, strict=True)
            for known, other in zip(ours, theirs, strict=True)
        ]
        gaps = [0.0 if known == other else abs(known - other) for known, other in pairs]  # -inf is equal to -inf
        return math.fsum(gaps) / len(gaps) if all(map(math.isfinite, gaps)) else math.inf


def read_known_logprobs(load_dir: str | Path) -> KnownLogprobs | None:
    """Read those of the checkpoint that the tracker names; None where the converter did not record any.

    Raises:
        CheckpointError: there is no such checkpoint, or the file is damaged.
    """
    path = find_checkpoint(load_dir) / KNOWN_LOGPROBS_JSON
    if not path.is_file():
        return None
    try:
        return as_dataclass(KnownLogprobs, read_json_object(path, strict=True), str(path))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
