"""``checkpoint.json``: the iteration and architecture of a checkpoint, and the size and digest of its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_tropd.models.architecture import Architecture, architecture_from_dict

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
        CheckpointError: it is not JSON, of another format or incomplete.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']}, this version reads {FORMAT}")
        return CheckpointMetadata(
            iteration=value["iteration"],
            architecture=architecture_from_dict(value["architecture"]),
            make_vocab_size_divisible_by=int(value["make_vocab_size_divisible_by"]),
            files={name: FileRecord(**record) for name, record in value["files"].items()},
            source=str(value.get("source", "")),  # 0.2.0 did not write it
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def check_architecture(metadata: CheckpointMetadata, architecture: Architecture, folder: Path) -> None:
    """Raise CheckpointError unless the checkpoint is of ``architecture``; the message lists what differs."""
    saved, wanted = asdict(metadata.architecture), asdict(architecture)
    differing = [f"{name} {saved[name]!r} (not {value!r})" for name, value in wanted.items() if value != saved[name]]
    if differing:
        raise CheckpointError(f"{folder} is a checkpoint of another architecture: it has {', '.join(differing)}")
