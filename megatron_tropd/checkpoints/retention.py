"""Which checkpoints a directory keeps, and the removal of the others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.checkpoints.directory import (
    find_checkpoint,
    iteration_name,
    iterations,
    latest_iteration,
    read_metadata,
    temporary_name,
)
from megatron_tropd.checkpoints.integrity import check_sizes
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.safety import check_pickles
from megatron_tropd.weights.files.hf_writer import fsync_path


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """What is kept besides the newest checkpoint; by default everything."""

    last: int = 0
    """--keep-last: so many newest ones."""
    interval: int = 0
    """--save-retain-interval: those whose step is a multiple of it."""

    def superseded(self, saved: Sequence[int], newest: int) -> list[int]:
        """Return which of the ``saved`` steps to remove once ``newest`` is whole, oldest first.

        Steps after ``newest`` do not count and stay: they are of a part of the run that is being made again.
        """
        if not (self.last or self.interval):
            return []
        former = sorted(step for step in saved if step <= newest)
        kept = {newest, *former[-max(self.last, 1) :]}
        return [step for step in former if step not in kept and not (self.interval and step % self.interval == 0)]


def remove_superseded(save_dir: Path, newest: int, retention: Retention) -> list[str]:
    """Remove what ``newest``, which the tracker names, makes superfluous; return warnings.  Not collective.

    Nothing is removed before the newest is found whole: all files of its manifest with their sizes, which were read
    back for their digests when it was written, and no code in them.  A checkpoint that is removed loses its name first,
    so that a reader sees all of it or none.
    """
    try:
        superseded = retention.superseded(iterations(save_dir), newest)
        if not superseded:
            return []
        if latest_iteration(save_dir) != newest:
            raise CheckpointError(f"the tracker in {save_dir} does not name iteration {newest}")
        folder = find_checkpoint(save_dir, newest)
        check_sizes(folder, read_metadata(save_dir, newest))
        check_pickles(folder)
    except (OSError, ValueError) as error:
        return [f"no earlier checkpoint was deleted, because the new one is not whole: {error}"]
    warnings = []
    for step in superseded:
        try:
            _remove(save_dir, step)
        except OSError as error:
            warnings.append(f"checkpoint {iteration_name(step)} was not deleted: {error}")
    return warnings


def _remove(save_dir: Path, step: int) -> None:
    unnamed = save_dir / temporary_name(step)  # the next save removes what is left of it
    (save_dir / iteration_name(step)).rename(unnamed)
    fsync_path(save_dir)
    shutil.rmtree(unnamed)
