"""Go on from an earlier checkpoint where the newest one is damaged."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.checkpoints.directory import (
    find_checkpoint,
    iteration_name,
    iterations,
    latest_iteration,
    read_metadata,
)
from megatron_tropd.checkpoints.integrity import check_sizes
from megatron_tropd.checkpoints.load import open_checkpoint
from megatron_tropd.checkpoints.metadata import CheckpointError, Iteration
from megatron_tropd.checkpoints.safety import check_pickles
from megatron_tropd.parallel.fail_together import on_rank_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """What is in a directory before anything of it is verified."""

    latest: Iteration | None
    """What the tracker names."""
    damage: str
    """Why the tracker names nothing; empty where it does, or where there is no checkpoint."""
    steps: tuple[int, ...]
    """Steps to try, newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The newest checkpoint of a directory that is whole."""

    step: int
    note: str = ""
    """Why newer ones were refused and what is lost, for people; empty where the newest was chosen."""
    refused: tuple[int, ...] = ()
    """Steps of damaged checkpoints."""


def newest_step(directory: str | Path) -> int | None:
    """Return the step that the tracker names; None where there is no checkpoint of a run.  Not collective.

    Raises:
        CheckpointError: the tracker is damaged, or missing beside checkpoints.
    """
    saved = _look(Path(directory))
    if saved.damage:
        raise CheckpointError(saved.damage)
    return saved.latest if isinstance(saved.latest, int) else None


def newest_whole(directory: str | Path) -> Choice | None:
    """Return the newest checkpoint of a run that verifies, digests included; None where there is none at all.

    Collective: every rank reads a share of the files, and all decide alike.

    Raises:
        CheckpointError: on every rank: there are checkpoints, and each is damaged; the message says how.
    """
    saved = on_rank_zero(lambda: _look(Path(directory)), CheckpointError)
    if not saved.damage and not isinstance(saved.latest, int):
        return None
    refused, damaged = [saved.damage] if saved.damage else [], []
    for step in saved.steps:
        try:
            open_checkpoint(directory, None if step == saved.latest else step)
        except CheckpointError as error:  # on every rank
            refused.append(str(error))
            damaged.append(step)
            continue
        return Choice(step=step, note=_note(directory, saved, step, refused), refused=tuple(damaged))
    raise CheckpointError(f"no checkpoint in {directory} is whole:" + "".join(f"\n  {reason}" for reason in refused))


def set_aside(directory: str | Path, choice: Choice) -> None:
    """Take their names from the damaged checkpoints, so that none counts as one that is kept.  Not collective.  What
    cannot be renamed stays as it is."""
    for step in choice.refused:
        folder = Path(directory) / iteration_name(step)
        with contextlib.suppress(OSError):
            folder.rename(folder.with_name(f"{folder.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"))


def with_advice(error: CheckpointError, directory: str | Path) -> CheckpointError:
    """Add to an error about the newest checkpoint which earlier one could be used, and how.  Not collective.

    Of the earlier ones only the sizes of the files are looked at: the launch that uses one reads their digests.
    """
    saved = _look(Path(directory))
    steps = saved.steps if saved.damage else [step for step in saved.steps if step != saved.latest]
    for step in steps:
        try:
            folder = find_checkpoint(directory, step)
            check_sizes(folder, read_metadata(directory, step))
            check_pickles(folder)
        except (OSError, ValueError):
            continue
        return CheckpointError(
            f"{error}\n  the newest earlier checkpoint that has all its files is {folder}: --fallback-previous resumes "
            "from it"
        )
    return CheckpointError(f"{error}\n  {directory} has no earlier checkpoint that is whole")


def _look(directory: Path) -> _Saved:
    steps = tuple(reversed(iterations(directory)))
    try:
        latest = latest_iteration(directory)
    except CheckpointError as error:
        return _Saved(latest=None, damage=str(error), steps=steps)
    if latest is None and steps:
        try:
            find_checkpoint(directory)
        except CheckpointError as error:  # that there is no tracker
            return _Saved(latest=None, damage=str(error), steps=steps)
    if isinstance(latest, int):
        steps = (latest, *(step for step in steps if step < latest))
    return _Saved(latest=latest, damage="", steps=steps)


def _note(directory: str | Path, saved: _Saved, step: int, refused: list[str]) -> str:
    if not refused:
        return ""
    newest = max([step, *saved.steps])
    count = newest - step
    steps = "1 saved step is" if count == 1 else f"{count} saved steps are"
    lost = f"{steps} lost and made again" if count else "no saved step is lost"
    reasons = "".join(f"\n  {reason}" for reason in refused)
    return f"warning: resuming from step {step} in {directory}; {lost}.  Refused (--fallback-previous):{reasons}"
