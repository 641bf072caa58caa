"""Megatron's checkpoint directory: which checkpoints it has, and what each holds.  Nothing here is collective."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_tropd.checkpoints.metadata import (
    METADATA_JSON,
    CheckpointError,
    CheckpointMetadata,
    Iteration,
    parse_metadata,
)
from megatron_tropd.checkpoints.safety import read_dcp_metadata

TRACKER_FILE = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"
RELEASE: Literal["release"] = "release"
"""The iteration of converted weights that have not been trained."""
_ITERATION = re.compile(r"iter_\d{7,}|release")
_TEMPORARY = re.compile(r"(iter_\d{7,}|release)\.tmp-")
_REPLACED = re.compile(r"(iter_\d{7,}|release)\.tmp-[0-9a-f]+-old")
_LONGEST_NUMBER = 18
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
"""Prefixes of the keys of model weights; keys of optimizer state have none of them."""


def is_temporary(name: str) -> bool:
    """Return whether a folder name is that of an unfinished save, or of a checkpoint in removal."""
    return _TEMPORARY.match(name) is not None


def temporary_name(iteration: Iteration, suffix: str = "") -> str:
    """Return a new name of which :func:`is_temporary` is true."""
    return f"{iteration_name(iteration)}.tmp-{secrets.token_hex(4)}{suffix}"


def iterations(directory: str | Path) -> list[int]:
    """Return the numbers of the checkpoints of a directory in order, whatever the tracker says."""
    names = (path.name for path in Path(directory).glob("iter_*") if path.is_dir())
    return sorted(int(name.removeprefix("iter_")) for name in names if _ITERATION.fullmatch(name))


def _replaced(directory: Path) -> Iterator[tuple[Path, Path]]:
    """Yield checkpoints that were moved away for a successor that did not take their name, and that name."""
    for path in directory.glob("*.tmp-*-old"):
        if (match := _REPLACED.fullmatch(path.name)) and not (final := directory / match[1]).exists():
            yield path, final


def is_being_replaced(directory: Path) -> bool:
    """Return whether a checkpoint is moved away for its successor, by a save that goes on or has ended there."""
    return any(True for _ in _replaced(directory))


def restore_replaced(directory: Path) -> None:
    """Give a checkpoint its name back that was moved away for its successor, by a save that ended before the successor
    took the name (``save.py``)."""
    for path, final in _replaced(directory):
        with contextlib.suppress(FileNotFoundError):  # the save goes on
            path.rename(final)


def iteration_name(iteration: Iteration) -> str:
    """Return the folder name of an iteration: ``iter_0000100`` or ``release``."""
    return RELEASE if iteration == RELEASE else f"iter_{int(iteration):07d}"


def latest_iteration(directory: str | Path) -> Iteration | None:
    """Return the iteration that the tracker names; None without a tracker (nothing has been saved yet).

    Raises:
        CheckpointError: the tracker holds neither a number nor ``release``.
    """
    tracker = Path(directory) / TRACKER_FILE
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not (text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER):
        found = "empty" if not text else f"{text[:40]!r}"
        raise CheckpointError(f"{tracker} is {found}; expected an iteration number or 'release'")
    return int(text)


def find_checkpoint(directory: str | Path, iteration: Iteration | None = None) -> Path:
    """Return the folder of ``iteration``, by default of the one that the tracker names.

    Raises:
        CheckpointError: there is no such checkpoint; the message lists those that exist.
    """
    directory = Path(directory)
    wanted = latest_iteration(directory) if iteration is None else iteration
    existing = sorted(p.name for p in directory.glob("*") if _ITERATION.fullmatch(p.name))
    listed = f"; the directory has {', '.join(existing) or 'no checkpoint'}"
    if wanted is None:
        raise CheckpointError(f"{directory} has no {TRACKER_FILE}{listed}; check --load")
    path = directory / iteration_name(wanted)
    if not path.is_dir():
        origin = f"{TRACKER_FILE} names" if iteration is None else "asked for"
        raise CheckpointError(f"{origin} iteration {wanted}, but {path} does not exist{listed}")
    return path


def read_metadata(directory: str | Path, iteration: Iteration | None = None) -> CheckpointMetadata:
    """Read the ``checkpoint.json`` of a checkpoint; no tensor is loaded.

    Raises:
        CheckpointError: there is no such checkpoint, or its ``checkpoint.json`` is missing or damaged.
    """
    path = find_checkpoint(directory, iteration) / METADATA_JSON
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete or was not written by megatron_tropd")
    return parse_metadata(path)


def hf_directory(directory: str | Path, iteration: Iteration | None = None) -> Path:
    """Return the folder inside a checkpoint that holds the HF config, tokenizer and manifest.

    Raises:
        CheckpointError: there is no such checkpoint, or it was saved without them.
    """
    path = find_checkpoint(directory, iteration) / HF_FOLDER
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: the checkpoint was saved without its Hugging Face files")
    return path


def stored_tensors(
    directory: str | Path, iteration: Iteration | None = None
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the global shape and dtype of every tensor by name, as Megatron stores them (layers stacked).

    Raises:
        CheckpointError: there is no such checkpoint, or its ``.metadata`` is missing, damaged or unsafe.
    """
    folder = find_checkpoint(directory, iteration)
    try:
        stored = read_dcp_metadata(folder).state_dict_metadata
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def model_dtype(directory: str | Path, iteration: Iteration | None = None) -> torch.dtype:
    """Return the dtype that holds every stored model weight exactly: their common dtype, or fp32 if they differ.

    Raises:
        CheckpointError: the checkpoint holds no model.
    """
    dtypes = {
        dtype for name, (_, dtype) in stored_tensors(directory, iteration).items() if name.startswith(MODEL_PREFIXES)
    }
    if not dtypes:
        raise CheckpointError(f"{find_checkpoint(directory, iteration)} holds no model weights")
    return dtypes.pop() if len(dtypes) == 1 else torch.float32
