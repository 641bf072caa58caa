"""Record the size and digest of every file at the save, and compare the files with them at the load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.checkpoints.metadata import (
    METADATA_JSON,
    CheckpointError,
    CheckpointMetadata,
    FileRecord,
    record_file,
)
from megatron_tropd.parallel.fail_together import from_all_ranks
from megatron_tropd.weights.files.hf_writer import fsync_path


def _share_of_files(folder: Path) -> list[Path]:
    """Return the files that this rank reads on behalf of all: every world-size-th."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != METADATA_JSON)
    return files[dist.get_rank() :: dist.get_world_size()]


def share_of_records(folder: Path, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Return size and digest of the files that this rank reads on behalf of all, each synced to disk first.

    Files in ``known`` were already digested and synced when they were written; they are not read again.
    """
    records = {}
    for path in _share_of_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in known:
            fsync_path(path)
        records[name] = known.get(name) or record_file(path)
    return records


def all_records(mine: Callable[[], dict[str, FileRecord]]) -> dict[str, FileRecord]:
    """Return the records of all files, of which ``mine`` gives this rank's :func:`share_of_records`.  Collective.

    Raises:
        CheckpointError: on every rank: a file could not be read on some rank.
    """
    parts = from_all_ranks(mine, CheckpointError)
    return {name: record for part in parts for name, record in sorted(part.items())}


def check_sizes(folder: Path, metadata: CheckpointMetadata) -> None:
    """Check that every recorded file is there with its recorded size.  Not collective.

    Raises:
        CheckpointError: names the file that is missing or damaged.
    """
    for name, record in metadata.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is incomplete")
        if path.stat().st_size != record.bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, {record.bytes} were saved; it is damaged")


def verify_files(
    folder: Path, metadata: CheckpointMetadata, *, digests: bool, except_suffix: tuple[str, ...] = ()
) -> None:  # fmt: skip
    """Check that every recorded file has its recorded size and, with ``digests``, this rank's share its sha256.

    Raises:
        CheckpointError: names the file that is missing or damaged.
    """
    check_sizes(folder, metadata)
    for path in _share_of_files(folder) if digests else ():
        if path.name.endswith(except_suffix):
            continue
        saved = metadata.files.get(path.relative_to(folder).as_posix())
        if saved is not None and (found := record_file(path).sha256) != saved.sha256:
            raise CheckpointError(f"{path} is damaged: its sha256 is {found}, {saved.sha256} was saved")
