"""``run.json`` of a training checkpoint: what the run was made of, so that a resume can tell another experiment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_tropd.checkpoints.known_logprobs import KnownLogprobs
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.json_files import as_dataclass, read_json_object

RUN_JSON = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """One model as it was when the run started."""

    digest: str
    """sha256 over the architecture and the bytes of the weight files."""
    known: KnownLogprobs | None = None
    """What a frozen model gave on a few sequences at the first start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """The content of ``run.json``."""

    settings: Mapping[str, Any]
    """Values by flag name in plain types: paths resolved, secrets hidden."""
    code: str
    """Version and commit of this package."""
    prompts: str
    """Digest of the tokenized prompts."""
    answers: str
    """Digest of the prompts' answers; empty where no reward reads them."""
    models: Mapping[str, ModelRecord] = field(default_factory=dict)
    """By role: ``student``, ``teacher``, ``reference``, those that the objective uses."""

    def to_json(self) -> str:
        """Return the text of ``run.json``."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_run_record(folder: Path) -> RunRecord | None:
    """Read the ``run.json`` of a checkpoint's folder; None where version 0.2.0 or the converter wrote the checkpoint.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / RUN_JSON
    if not path.is_file():
        return None
    try:
        return as_dataclass(RunRecord, read_json_object(path, strict=True), str(path))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
