"""Digests of the weights of a run's models, so that a resume notices that a model is another one or was damaged.

Size and time of a file say nothing about a flipped bit, so the bytes are hashed.  HF files are hashed when the job
starts, each file on one rank: 1 to 2 seconds per gigabyte and rank, of files that loading reads anyway.  A Megatron
checkpoint needs no reading: ``checkpoint.json`` has the digests, and loading compares every file with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.checkpoints.directory import read_metadata
from megatron_tropd.checkpoints.metadata import record_file
from megatron_tropd.cli import ConfigError
from megatron_tropd.parallel.fail_together import from_all_ranks, on_rank_zero
from megatron_tropd.setup.model_specs import Models, ModelSpec
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint


def model_digests(models: Models) -> dict[str, str]:
    """Return a sha256 (hex) over architecture and weight files of every model, by role.  Collective over the world.

    Files with the same names and bytes give the same digest wherever they are.

    Raises:
        ConfigError: on every rank: a file cannot be read.
    """
    sources = models.by_role
    stored = on_rank_zero(lambda: {role: _stored_files(source) for role, source in sources.items()}, _unreadable)
    unread = {path for files in stored.values() for path, digest in files.items() if not digest}
    order = on_rank_zero(lambda: sorted(unread, key=lambda path: (-Path(path).stat().st_size, path)), _unreadable)
    mine = order[dist.get_rank() :: dist.get_world_size()]
    parts = from_all_ranks(lambda: {path: record_file(Path(path)).sha256 for path in mine}, _unreadable)
    read = {path: digest for part in parts for path, digest in part.items()}
    return {role: _digest(source, {**stored[role], **read}, stored[role]) for role, source in sources.items()}


def _unreadable(reason: str) -> ConfigError:
    return ConfigError([reason])


def _stored_files(source: ModelSpec) -> dict[str, str]:
    """Return the weight files of a model with their digests, "" where none is stored."""
    if source.megatron_dir is None:
        return {str(source.hf_dir / name): "" for name in HfCheckpoint.open(source.hf_dir, source.arch).headers}
    files = read_metadata(source.megatron_dir).files
    return {name: record.sha256 for name, record in files.items() if name.endswith(".distcp")}


def _digest(source: ModelSpec, digests: Mapping[str, str], files: Mapping[str, str]) -> str:
    named = sorted((Path(path).name, digests[path]) for path in files)
    return hashlib.sha256(json.dumps([asdict(source.arch), named], sort_keys=True).encode()).hexdigest()
