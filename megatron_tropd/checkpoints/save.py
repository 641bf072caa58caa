"""Training checkpoints in Megatron's directory conventions; complete or invisible.

    <save>/latest_checkpointed_iteration.txt     "100" or "release"
    <save>/iter_0000100/                         torch_dist: loads at any TP x PP x DP
        checkpoint.json                          architecture, iteration, size and sha256 of every file
        hf/                                      config, tokenizer and file layout of the HF model it came from

A checkpoint is written under a temporary name, made durable, renamed, and only then does the tracker
name it.  Every function that is collective raises the same error on every rank.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.checkpoints.directory import HF_FOLDER, TRACKER_FILE, is_temporary, iteration_name
from megatron_tropd.checkpoints.integrity import record_and_sync
from megatron_tropd.checkpoints.metadata import (
    METADATA_JSON,
    CheckpointError,
    CheckpointMetadata,
    FileRecord,
    Iteration,
)
from megatron_tropd.checkpoints.safety import check_plain
from megatron_tropd.checkpoints.state import COMMON_KEY, without_extra_state
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.fail_together import FailedElsewhere, on_all_ranks, on_rank_zero
from megatron_tropd.parallel.layout import DEFAULT_VOCAB_DIVISOR
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint, copy_sidecars
from megatron_tropd.weights.files.hf_manifest import MANIFEST_FILE, HfManifest
from megatron_tropd.weights.files.hf_writer import fsync_path, replace_text


def write_hf_folder(sidecar: Path, manifest: HfManifest | None, target: Path) -> None:
    """Copy config and tokenizer; keep how the HF files were laid out."""
    copy_sidecars(sidecar, target, skip=[MANIFEST_FILE])
    if manifest is None:
        kept = HfManifest.load(sidecar)
        if kept is None and any(sidecar.glob("*.safetensors")):
            kept = HfManifest.of(HfCheckpoint.open(sidecar))
        manifest = kept.without_digests() if kept is not None else None  # training changed the weights
    if manifest is not None:
        replace_text(target / MANIFEST_FILE, manifest.to_json())


def _prepare(save_dir: Path, iteration: Iteration) -> Path:
    """An empty temporary folder for this save, and none left of earlier ones."""
    save_dir.mkdir(parents=True, exist_ok=True)
    for stale in save_dir.iterdir():
        if is_temporary(stale.name):
            shutil.rmtree(stale)
    temporary = save_dir / f"{iteration_name(iteration)}.tmp-{secrets.token_hex(4)}"
    temporary.mkdir()
    return temporary


def _write(state: dict[str, Any], folder: Path) -> None:
    """Megatron's save.  Its failure reaches every rank, its reason only rank 0."""
    try:
        dist_checkpointing.save(state, str(folder))
    except CheckpointException as error:
        if not error.failures:
            raise FailedElsewhere from error
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items())
        raise CheckpointError(f"cannot write {folder}: {reasons}") from error


def _publish(save_dir: Path, temporary: Path, iteration: Iteration, metadata: CheckpointMetadata) -> Path:
    """Give the finished folder its name, then let the tracker name it."""
    replace_text(temporary / METADATA_JSON, metadata.to_json())
    for folder in (temporary / HF_FOLDER, temporary):
        if folder.is_dir():
            fsync_path(folder)
    final = save_dir / iteration_name(iteration)
    if final.exists():  # saved before a restart; out of the way first, a folder cannot be replaced
        os.rename(final, final.with_name(f"{temporary.name}-old"))
    os.rename(temporary, final)
    fsync_path(save_dir)
    replace_text(save_dir / TRACKER_FILE, f"{iteration}\n")
    for old in save_dir.glob(f"{temporary.name}-old"):
        shutil.rmtree(old)
    return final


def save_checkpoint(
    save_dir: str | Path, iteration: Iteration, sharded_state_dict: Mapping[str, Any], common: Mapping[str, Any],
    *, arch: Architecture, hf_sidecar: str | Path | None, manifest: HfManifest | None = None,
    make_vocab_size_divisible_by: int = DEFAULT_VOCAB_DIVISOR,
) -> Path:  # fmt: skip
    """Write one checkpoint and make it the latest.  Collective; returns its folder.

    Args:
        save_dir: Made if missing; on a file system all ranks share.
        iteration: Number of optimizer steps done, or ``"release"``.
        sharded_state_dict: Megatron ShardedTensors of model and optimizer, under keys of the caller's choice.
        common: Small plain values, equal on all ranks: numbers, strings, lists, dicts, tensors.
        arch: Stored, so that a reader knows the model before it builds one.
        hf_sidecar: Folder with the HF config and tokenizer: the HF model or another checkpoint's ``hf/``.
        manifest: How to write HF files again; by default that of ``hf_sidecar`` without its digests.
        make_vocab_size_divisible_by: Stored for the reader.

    Raises:
        CheckpointError: on every rank; the tracker still names the checkpoint before.
    """
    state = {**without_extra_state(sharded_state_dict), COMMON_KEY: dict(common)}

    def write(folder: Path) -> dict[str, FileRecord]:
        on_all_ranks(lambda: check_plain(state), CheckpointError)
        on_all_ranks(lambda: _write(state, folder), CheckpointError)
        return {}

    def write_hf(target: Path) -> None:
        if hf_sidecar is not None:
            write_hf_folder(Path(hf_sidecar), manifest, target)

    return write_checkpoint(
        save_dir, iteration, write, write_hf, arch=arch, make_vocab_size_divisible_by=make_vocab_size_divisible_by
    )


def write_checkpoint(
    save_dir: str | Path, iteration: Iteration, write: Callable[[Path], Mapping[str, FileRecord]],
    write_hf: Callable[[Path], None], *, arch: Architecture, make_vocab_size_divisible_by: int,
) -> Path:  # fmt: skip
    """The protocol around the tensors: temporary folder, records of every file, rename, tracker.  Collective.

    Args:
        save_dir: As for :func:`save_checkpoint`, like ``iteration`` and the last two.
        write: Fills the folder it is given, on every rank; returns the records of files that it has
            already digested and made durable (the same on every rank).  Fails on all ranks or on none.
        write_hf: On rank 0, fills ``hf/``, which it makes.

    Raises:
        CheckpointError: on every rank; the tracker still names the checkpoint before.
    """
    save_dir = Path(save_dir)
    temporary = on_rank_zero(lambda: _prepare(save_dir, iteration), CheckpointError)
    try:
        known = write(temporary)
        on_rank_zero(lambda: write_hf(temporary / HF_FOLDER), CheckpointError)
        metadata = CheckpointMetadata(
            iteration=iteration,
            architecture=arch,
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            files=record_and_sync(temporary, known),
        )
        return on_rank_zero(lambda: _publish(save_dir, temporary, iteration, metadata), CheckpointError)
    except CheckpointError:  # on every rank, so that no rank writes any more
        if dist.get_rank() == 0:
            _sweep(save_dir, temporary)
        raise


def _sweep(save_dir: Path, temporary: Path) -> None:
    """Give back the disk space of a save that failed, as far as it goes; the next save sweeps too."""
    shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        save_dir.rmdir()  # only if this save made it, or it was empty before
