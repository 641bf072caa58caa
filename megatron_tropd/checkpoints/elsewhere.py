"""Save on another disk what its own could not take (--emergency-save), and know such a checkpoint again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_tropd.checkpoints.directory import latest_iteration
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.save import save_checkpoint
from megatron_tropd.parallel.fail_together import on_rank_zero
from megatron_tropd.weights.files.hf_writer import replace_text

ORIGIN_FILE = "saved_instead_of.txt"
"""Beside the tracker of an emergency save: the --save directory that could not be written."""


class SavedElsewhere(CheckpointError):
    """A save failed, and the same state is in --emergency-save; the text says where, and how to go on."""

    says_how_to_continue = True


def save_elsewhere(
    error: CheckpointError, place: Path, run_dir: Path, save_dir: str, step: int, content: Mapping[str, Any]
) -> NoReturn:
    """Save the state after ``step`` in a new directory below ``place``, named after the run.  Collective.

    Args:
        error: of the save that failed.
        place: --emergency-save.
        run_dir, save_dir: of the run.
        step: as for :func:`save_checkpoint`, as is the rest, ``content``.

    Raises:
        SavedElsewhere: on every rank: it is saved.
        CheckpointError: on every rank: it could not be saved there either.
    """
    try:
        directory = on_rank_zero(lambda: _new_directory(place, run_dir), CheckpointError)
        save_checkpoint(directory, step, **content)
        origin = f"{Path(save_dir).resolve()}\n"
        on_rank_zero(lambda: replace_text(directory / ORIGIN_FILE, origin), CheckpointError)
    except CheckpointError as also:
        raise CheckpointError(f"{error}\n--emergency-save {place} failed too: {also}") from error
    raise SavedElsewhere(
        f"{error}\nThe state after step {step} is saved in {directory} instead (--emergency-save).  When "
        f"{save_dir} can be written again, run the same command with --load {directory}: it goes on from there.  "
        "Or give a --run-dir and a --save on another disk too"
    ) from error


def is_ahead(directory: str | Path, save_dir: str | Path) -> bool:
    """Return whether ``directory`` is an emergency save of the run that saves in ``save_dir``, with a later step than
    that has.  Not collective.  Where that cannot be known, it is not."""
    try:
        origin = (Path(directory) / ORIGIN_FILE).read_text(encoding="utf-8").strip()
        if origin != str(Path(save_dir).resolve()):
            return False
        there, here = latest_iteration(directory), latest_iteration(save_dir)
    except (OSError, ValueError):
        return False
    return isinstance(there, int) and (not isinstance(here, int) or there > here)


def _new_directory(place: Path, run_dir: Path) -> Path:
    """Make a directory named after the run; never one that is there, which may be of another run with that name."""
    name = run_dir.resolve().name
    place.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        directory = place / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir()
        except FileExistsError:
            continue
        return directory
    raise AssertionError("unreachable")
