"""Find, check and load a training checkpoint, into any parallel layout.  Collective."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megatron_tropd.checkpoints.directory import find_checkpoint, read_metadata
from megatron_tropd.checkpoints.integrity import verify_files
from megatron_tropd.checkpoints.metadata import CheckpointError, CheckpointMetadata, Iteration, check_architecture
from megatron_tropd.checkpoints.safety import check_pickles
from megatron_tropd.checkpoints.state import COMMON_KEY, without_extra_state
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.fail_together import on_all_ranks, on_rank_zero


def open_checkpoint(
    load_dir: str | Path, iteration: Iteration | None = None, *, arch: Architecture | None = None,
    verify_digests: bool = True, tensors_checked_later: bool = False,
) -> tuple[Path, CheckpointMetadata]:  # fmt: skip
    """Find a checkpoint and check everything that can be checked without loading its tensors.  Collective.

    Checks the size (and digest) of every file, and that no file runs code when it is read.  Arguments and errors are
    those of :func:`load_checkpoint`.  With ``tensors_checked_later`` the tensor files are not read for their digest,
    because the caller compares a digest of every tensor itself.
    """
    unread = (".distcp",) if tensors_checked_later else ()

    def look() -> tuple[Path, CheckpointMetadata]:
        metadata = read_metadata(load_dir, iteration)
        folder = find_checkpoint(load_dir, iteration)
        if arch is not None:
            check_architecture(metadata, arch, folder)
        verify_files(folder, metadata, digests=False)
        check_pickles(folder)
        return folder, metadata

    folder, metadata = on_rank_zero(look, CheckpointError)
    on_all_ranks(lambda: verify_files(folder, metadata, digests=verify_digests, except_suffix=unread), CheckpointError)
    return folder, metadata


def load_checkpoint(
    load_dir: str | Path, iteration: Iteration | None, sharded_state_dict: Mapping[str, Any],
    *, arch: Architecture | None = None, verify_digests: bool = True,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Load the shards that ``sharded_state_dict`` describes, whatever layout saved them.  Collective.

    Args:
        load_dir: Folder with the tracker.
        iteration: None for the one that the tracker names.
        sharded_state_dict: ShardedTensors of the receiving model (and optimizer).
        arch: If given, the checkpoint must be of this architecture.
        verify_digests: Also read every file, each on one rank, and compare its sha256.

    Returns:
        The state dict (to be loaded by :func:`load_model_state`, ``optimizer.load_state_dict``), and ``common``.

    Raises:
        CheckpointError: on every rank.  All checks of files come before the tensors of the caller are written to.
    """
    folder, _ = open_checkpoint(load_dir, iteration, arch=arch, verify_digests=verify_digests)
    state = on_all_ranks(
        lambda: dist_checkpointing.load(
            without_extra_state(sharded_state_dict), str(folder), strict=StrictHandling.RAISE_UNEXPECTED
        ),
        CheckpointError,
    )
    return state, state.pop(COMMON_KEY, {})
