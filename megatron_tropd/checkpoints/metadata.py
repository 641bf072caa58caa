"""``checkpoint.json``: the iteration and architecture of a checkpoint, and the size and digest of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_tropd.json_files import as_dataclass, read_json_object, shown
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.plain_names import inner_path_fault

METADATA_JSON = "checkpoint.json"
FORMAT = 1
Iteration = int | Literal["release"]


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which file and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """Size and digest of one file of a checkpoint."""

    bytes: int
    sha256: str


def record_file(path: Path) -> FileRecord:
    """Read a file and return its size and digest."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileRecord(bytes=stream.tell(), sha256=digest.hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMetadata:
    """The content of ``checkpoint.json``."""

    iteration: Iteration
    architecture: Architecture
    make_vocab_size_divisible_by: int
    files: dict[str, FileRecord]
    """Records by path inside the checkpoint's folder, without ``checkpoint.json`` itself."""
    source: str = ""
    """The model of the Hugging Face Hub that the weights come from, ``owner/name@commit``; empty if not known."""

    def to_json(self) -> str:
        """Return the text of ``checkpoint.json``."""
        value = {
            "format": FORMAT,
            "iteration": self.iteration,
            "architecture": asdict(self.architecture),
            "make_vocab_size_divisible_by": self.make_vocab_size_divisible_by,
            "source": self.source,
            "files": {name: asdict(record) for name, record in self.files.items()},
        }
        return json.dumps(value, indent=1) + "\n"


def parse_metadata(path: Path) -> CheckpointMetadata:
    """Read ``checkpoint.json``.

    Raises:
        CheckpointError: it is not JSON, of another format or incomplete; the message names the field.
    """
    try:
        value = read_json_object(path, strict=True)
        if (found := value.pop("format", None)) != FORMAT:
            raise ValueError(f"{path}: format is {shown(found)}; this version reads {FORMAT}")
        metadata = as_dataclass(CheckpointMetadata, value, str(path))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if fault := next((fault for name in metadata.files if (fault := inner_path_fault(name))), ""):
        raise CheckpointError(f"{path} is damaged: it names {fault}")
    return metadata


def check_architecture(metadata: CheckpointMetadata, architecture: Architecture, folder: Path) -> None:
    """Raise CheckpointError unless the checkpoint is of ``architecture``; the message lists what differs."""
    saved, wanted = asdict(metadata.architecture), asdict(architecture)
    differing = [f"{name} {saved[name]!r} (not {value!r})" for name, value in wanted.items() if value != saved[name]]
    if differing:
        raise CheckpointError(f"{folder} is a checkpoint of another architecture: it has {', '.join(differing)}")
