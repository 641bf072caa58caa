"""Write checkpoints in Megatron's directory conventions, so that none is visible before it is complete.

    <save>/latest_checkpointed_iteration.txt     "100" or "release"
    <save>/iter_0000100/                         torch_dist: loads into any TP x PP x DP
        checkpoint.json                          architecture, iteration, size and sha256 of every file
        run.json                                 of a training run: its settings, digests of its prompts and models
        hf/                                      config, tokenizer and file layout of the HF model it came from

A checkpoint is written under a temporary name, synced to disk and renamed; only then is its iteration written to the
tracker.  Every collective function raises the same error on every rank.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.atomic_files import CannotWrite, exchange, reason_of, writing
from megatron_tropd.checkpoints.directory import (
    HF_FOLDER,
    TRACKER_FILE,
    is_temporary,
    iteration_name,
    restore_replaced,
    temporary_name,
)
from megatron_tropd.checkpoints.integrity import all_records, share_of_records
from megatron_tropd.checkpoints.metadata import (
    METADATA_JSON,
    CheckpointError,
    CheckpointMetadata,
    FileRecord,
    Iteration,
    parse_metadata,
    record_file,
)
from megatron_tropd.checkpoints.run_record import RUN_JSON, RunRecord
from megatron_tropd.checkpoints.safety import check_plain, common_part
from megatron_tropd.checkpoints.state import COMMON_KEY, without_extra_state
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel import checkpoint_writers, platform
from megatron_tropd.parallel.fail_together import FailedElsewhere, on_all_ranks, on_rank_zero
from megatron_tropd.parallel.layout import DEFAULT_VOCAB_DIVISOR
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint, copy_sidecars
from megatron_tropd.weights.files.hf_manifest import MANIFEST_FILE, HfManifest
from megatron_tropd.weights.files.hf_writer import fsync_path, replace_text


def write_hf_folder(sidecar: Path, manifest: HfManifest | None, target: Path) -> None:
    """Copy config and tokenizer of ``sidecar``, and write the manifest of how the HF files were laid out.

    Without ``manifest`` it is taken from ``sidecar``, without digests.
    """
    copy_sidecars(sidecar, target, skip=[MANIFEST_FILE])
    if manifest is None:
        kept = HfManifest.load(sidecar)
        if kept is None and any(sidecar.glob("*.safetensors")):
            kept = HfManifest.of(HfCheckpoint.open(sidecar))
        manifest = kept.without_digests() if kept is not None else None  # training changed the weights
    if manifest is not None:
        replace_text(target / MANIFEST_FILE, manifest.to_json())


def _prepare(save_dir: Path, iteration: Iteration) -> Path:
    """Remove the temporary folders of earlier saves, and make one for this save."""
    with writing(save_dir):
        save_dir.mkdir(parents=True, exist_ok=True)
    fsync_path(save_dir.parent)
    restore_replaced(save_dir)
    for stale in save_dir.iterdir():
        if is_temporary(stale.name):
            shutil.rmtree(stale, ignore_errors=True)  # another process may have a file of it open
    temporary = save_dir / temporary_name(iteration)
    with writing(temporary):
        temporary.mkdir()
    return temporary


@contextlib.contextmanager
def megatrons_reasons(folder: Path) -> Iterator[None]:
    """Raise Megatron's error of a failed save as a CheckpointError with the reasons.  If a rank cannot write its part,
    Megatron raises on every rank, but only rank 0 gets the reasons; what only rank 0 writes fails on rank 0 alone."""
    try:
        with checkpoint_writers.raising_what_was_put_aside():
            yield
    except CheckpointException as error:
        if not error.failures:
            raise FailedElsewhere from error
        reasons = "; ".join(f"rank {rank}: {reason}" for rank, (reason, _) in error.failures.items())
        raise CheckpointError(f"cannot write {folder}: {reasons}{_room(folder)}") from error
    except OSError as error:
        reason = str(error) if isinstance(error, CannotWrite) else f"cannot write {folder}: {reason_of(error)}"
        raise CheckpointError(f"{reason}{_room(folder)}") from error


def _room(folder: Path) -> str:
    """Return how much room there is: torch's writer does not say that a disk is full."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""
    return f" (its disk has {free / 1e9:.1f} GB free, apart from quotas; a full one may have caused this)"


def begin_write(state: dict[str, Any], folder: Path, **options: Any) -> Any:
    """Save with Megatron, so that every supported version of it can load the checkpoint; return what its ``save`` does
    with these ``options``.  Collective, and every rank comes to its end; it may then fail on some ranks only."""
    common = common_part(state)
    with megatrons_reasons(folder):
        request = dist_checkpointing.save(state, str(folder), **options)
        if dist.get_rank() == 0:
            checkpoint_writers.putting_aside(platform.write_common_state)(folder, common)
    return request


def state_to_save(sharded_state_dict: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Megatron is to save.  Collective.

    Raises:
        CheckpointError: on every rank: a value is not plain data, and no load would accept it.
    """
    state = {**without_extra_state(sharded_state_dict), COMMON_KEY: dict(common)}
    on_all_ranks(lambda: check_plain(state), CheckpointError)
    return state


def write_record(folder: Path, record: RunRecord | None) -> None:
    """Write ``run.json``, if there is a record.  Collective."""
    if record is not None:
        on_rank_zero(lambda: replace_text(folder / RUN_JSON, record.to_json()), CheckpointError)


def _publish(save_dir: Path, temporary: Path, iteration: Iteration, metadata: CheckpointMetadata) -> Path:
    """Give the finished folder its final name, then write its iteration to the tracker."""
    replace_text(temporary / METADATA_JSON, metadata.to_json())
    for folder in (temporary / HF_FOLDER, temporary):
        if folder.is_dir():
            fsync_path(folder)
    final = save_dir / iteration_name(iteration)
    former = None
    with writing(final):
        if not final.exists():
            os.rename(temporary, final)
        elif exchange(temporary, final):  # saved before a restart, or without the batch that is in this one
            former = temporary
        else:  # moved away first, because a rename cannot replace a folder; restore_replaced mends what ends in between
            former = final.with_name(f"{temporary.name}-old")
            os.rename(final, former)
            os.rename(temporary, final)
    fsync_path(save_dir)
    replace_text(save_dir / TRACKER_FILE, f"{iteration}\n")
    if former is not None:
        shutil.rmtree(former, ignore_errors=True)  # the next save removes what is left
    return final


def save_checkpoint(
    save_dir: str | Path, iteration: Iteration, sharded_state_dict: Mapping[str, Any], common: Mapping[str, Any],
    *, arch: Architecture, hf_sidecar: str | Path | None, manifest: HfManifest | None = None,
    make_vocab_size_divisible_by: int = DEFAULT_VOCAB_DIVISOR, source: str = "",
    record: RunRecord | None = None,
) -> Path:  # fmt: skip
    """Write one checkpoint and make it the latest.  Collective; returns its folder.

    Args:
        save_dir: Made if missing; on a file system that all ranks share.
        iteration: Number of training steps (rollout batches) done, or ``"release"``.
        sharded_state_dict: Megatron ShardedTensors of model and optimizer, under keys of the caller's choice.
        common: Small plain values, equal on all ranks: numbers, strings, lists, dicts, tensors.
        arch: Stored, so that a reader can check it before it builds the model.
        hf_sidecar: Folder with the HF config and tokenizer: the HF model or another checkpoint's ``hf/``.
        manifest: How to lay out HF files again; by default that of ``hf_sidecar`` without its digests.
        make_vocab_size_divisible_by: Stored for the reader.
        source: Stored: the model of the Hugging Face Hub that the weights come from, ``owner/name@commit``.
        record: Stored as ``run.json``: what the run was made of.

    Raises:
        CheckpointError: on every rank; the tracker still names the previous checkpoint.
    """

    def write(folder: Path) -> dict[str, FileRecord]:
        state = state_to_save(sharded_state_dict, common)
        on_all_ranks(lambda: begin_write(state, folder), CheckpointError)
        write_record(folder, record)
        return {}

    def write_hf(target: Path) -> None:
        if hf_sidecar is not None:
            write_hf_folder(Path(hf_sidecar), manifest, target)

    return write_checkpoint(
        save_dir, iteration, write, write_hf,
        arch=arch, make_vocab_size_divisible_by=make_vocab_size_divisible_by, source=source,
    )  # fmt: skip


def write_checkpoint(
    save_dir: str | Path, iteration: Iteration, write: Callable[[Path], Mapping[str, FileRecord]],
    write_hf: Callable[[Path], None], *, arch: Architecture, make_vocab_size_divisible_by: int, source: str = "",
) -> Path:  # fmt: skip
    """Write a checkpoint whose tensors ``write`` stores: temporary folder, file records, rename, tracker.  Collective.

    Args:
        save_dir: As for :func:`save_checkpoint`, as are ``iteration`` and the last three arguments.
        write: Called on every rank with the folder to fill; returns the records of the files that it has
            already digested and synced to disk (the same on every rank).  Fails on all ranks or on none.
        write_hf: Called on rank 0 with the path of ``hf/``, which it makes and fills.

    Raises:
        CheckpointError: on every rank; the tracker still names the previous checkpoint.
    """
    unpublished = Unpublished.begin(
        save_dir, iteration, arch=arch, make_vocab_size_divisible_by=make_vocab_size_divisible_by, source=source
    )
    with unpublished.swept_on_failure():
        known = write(unpublished.folder)
        on_rank_zero(lambda: write_hf(unpublished.folder / HF_FOLDER), CheckpointError)
        return unpublished.publish(lambda: share_of_records(unpublished.folder, known))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpublished:
    """A checkpoint that is being written under a temporary name."""

    folder: Path
    """Where it is written."""
    save_dir: Path
    content: CheckpointMetadata
    """What is known of it, still without its files."""

    @classmethod
    def begin(
        cls, save_dir: str | Path, iteration: Iteration, *, arch: Architecture, make_vocab_size_divisible_by: int,
        source: str,
    ) -> Unpublished:  # fmt: skip
        """Make the folder; arguments are those of :func:`write_checkpoint`.  Collective.

        Raises:
            CheckpointError: on every rank: it cannot be made.
        """
        path = Path(save_dir)
        content = CheckpointMetadata(
            iteration=iteration, architecture=arch, make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            files={}, source=source,
        )  # fmt: skip
        folder = on_rank_zero(lambda: _prepare(path, iteration), CheckpointError)
        return cls(folder=folder, save_dir=path, content=content)

    def publish(self, share: Callable[[], dict[str, FileRecord]]) -> Path:
        """Give the folder its final name and return it; ``share`` gives this rank's records.  Collective.

        Raises:
            CheckpointError: on every rank; the tracker still names the previous checkpoint.
        """
        metadata = replace(self.content, files=all_records(share))
        return on_rank_zero(lambda: _publish(self.save_dir, self.folder, metadata.iteration, metadata), CheckpointError)

    @contextlib.contextmanager
    def swept_on_failure(self) -> Iterator[None]:
        """Remove what was written if a CheckpointError is raised, on every rank: then no rank is still writing."""
        try:
            yield
        except CheckpointError:
            if dist.get_rank() == 0:
                _sweep(self.save_dir, self.folder)
            raise


def add_text(folder: Path, name: str, text: str) -> None:
    """Add a text file to a finished checkpoint, with its record in ``checkpoint.json``.  Not collective."""
    replace_text(folder / name, text)
    metadata = parse_metadata(folder / METADATA_JSON)
    files = {**metadata.files, name: record_file(folder / name)}
    replace_text(folder / METADATA_JSON, replace(metadata, files=files).to_json())


def _sweep(save_dir: Path, temporary: Path) -> None:
    """Remove the files of a failed save as far as possible; the next save removes what is left."""
    shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):
        restore_replaced(save_dir)
    with contextlib.suppress(OSError):
        save_dir.rmdir()  # works only if the folder is empty
