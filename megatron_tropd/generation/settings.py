"""What decides the responses of an output directory, so that a command that is given again goes on with the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.atomic_files import replacing
from megatron_tropd.data.encoding.encode import Encoder
from megatron_tropd.data.reading.sources import DataFile
from megatron_tropd.file_digest import digest_files
from megatron_tropd.json_files import read_json_object

FILE = "generation.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What must be the same in every launch that writes to one directory."""

    hf_checkpoint: str
    """As it was given, or name and commit on the Hub."""
    model: str
    """Digest of config, tokenizer, chat template and weights."""
    prompt_data: tuple[str, ...]
    data: str
    """Digest of the data files and of how they are read and encoded."""
    num_prompts: int
    n_samples_per_prompt: int
    temperature: float
    top_p: float
    max_response_length: int
    stop_token_ids: tuple[int, ...]
    seed: int
    keep: str
    grader: str
    answer_pattern: str
    lenient_grading: bool
    responses_per_shard: int
    engine: str
    dtype: str
    sglang_flags: tuple[str, ...]
    """Those that are passed to the servers."""


_COMPARED = {
    "model": "the model of --hf-checkpoint",
    "data": "the files of --prompt-data, or how they are read (keys, template, tokenizer and its version, limits)",
    "sglang_flags": "flags for the SGLang servers",
}
"""Values that are not shown, and what a message calls them."""
_NOT_COMPARED = ("hf_checkpoint", "prompt_data")
"""Names, of which the digests tell whether they mean the same."""


def data_digest(files: Sequence[DataFile], encoder: Encoder) -> str:
    """Return a digest of the data files, wherever they are, and of how they are encoded.

    Raises:
        OSError: a file cannot be read.
    """
    paths = [path for file in files for path in _parts(Path(file.path))]
    return hashlib.sha256(f"{digest_files(paths)} {encoder.fingerprint()}".encode()).hexdigest()


def _parts(path: Path) -> list[Path]:
    """Return the files of a saved data set, or the file itself."""
    return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]


def claim(directory: Path, identity: Identity) -> None:
    """Record ``identity`` in a new output directory, or compare it with that of the launches before.

    Raises:
        ValueError: the directory holds responses that were made in another way, or other files.
        OSError: it cannot be written.
    """
    path = directory / FILE
    mine: dict[str, Any] = json.loads(json.dumps(asdict(identity)))
    if path.exists():
        differing = _differences(read_json_object(path), mine)
        if differing:
            raise ValueError(
                f"--save {directory} holds responses that were made in another way:\n"
                + "\n".join(f"  {line}" for line in differing)
                + "\ngive the same flags, or another --save"
            )
        return
    strangers = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    if strangers:
        raise ValueError(
            f"--save {directory} is not empty ({', '.join(strangers[:5])}) and no {FILE} says that it holds "
            "responses; give a new or empty directory"
        )
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in here.items():
        if name in _NOT_COMPARED or there.get(name) == value:
            continue
        if name in _COMPARED:
            lines.append(f"{_COMPARED[name]} differ")
        else:
            lines.append(f"--{name.replace('_', '-')}: {there.get(name)!r} there, {value!r} here")
    return lines
