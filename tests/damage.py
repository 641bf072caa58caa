"""Damage stored weights as a failing disk or memory does: one bit of one number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from megatron_tropd.checkpoints.metadata import METADATA_JSON, parse_metadata, record_file
from tests.hf_models import read_tensors, write_tensors

TOP_EXPONENT_BIT = 30
"""Of an fp32 number.  It is 0 in every number below 2, and turns 0.1 into about 3e37."""


def flip_hf(directory: Path, name: str, index: int, bit: int = TOP_EXPONENT_BIT) -> None:
    """Flip one bit of one fp32 number of an HF checkpoint."""
    tensors = read_tensors(directory)
    tensors[name].view(torch.int32).view(-1)[index] ^= 1 << bit
    write_tensors(directory, tensors)


def flip_megatron(folder: Path, row: torch.Tensor, bit: int = TOP_EXPONENT_BIT) -> None:
    """Flip one bit of the first number of ``row``, found by its bytes, in a checkpoint whose digests do not know.

    So it looks as if the bit had flipped in memory, before the digest was made.
    """
    wanted = row.contiguous().numpy().tobytes()
    (path,) = (path for path in folder.glob("*.distcp") if wanted in path.read_bytes())
    data = bytearray(path.read_bytes())
    data[data.index(wanted) + bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    update_digest(folder, path.name)


def update_digest(folder: Path, name: str) -> None:
    """Record a changed file of a checkpoint as if it had been saved like this."""
    metadata = parse_metadata(folder / METADATA_JSON)
    files = {**metadata.files, name: record_file(folder / name)}
    (folder / METADATA_JSON).write_text(replace(metadata, files=files).to_json())


def edit_json(folder: Path, name: str, change) -> None:
    """Change a JSON file of a checkpoint, digest included."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))
    update_digest(folder, name)
