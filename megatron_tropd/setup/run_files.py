"""The files that rank 0 holds open during a run: the run directory and the sinks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_tropd.checkpoints.directory import iterations
from megatron_tropd.cli import ConfigError, to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel.fail_together import is_rank_zero, on_all_ranks
from megatron_tropd.reporting.run_directory import RunDirectory
from megatron_tropd.reporting.sinks import Sinks, make_sinks
from megatron_tropd.teacher_files import file_of_teacher, settings_of_teachers


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """The run directory and the sinks; on every rank but 0 there are none."""

    directory: RunDirectory | None
    sinks: Sinks

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened to the files of an earlier launch, for people."""
        moved = self.directory.moved_aside if self.directory is not None else None
        if moved is None:
            return ()
        return (
            f"note: an earlier launch in {moved.parent} ended before its first checkpoint: this one starts over, and "
            f"the log and rollouts of the earlier one are now in {moved.name}/",
        )

    def close(self) -> None:
        """Close the sinks and release the run directory."""
        self.sinks.close()
        if self.directory is not None:
            self.directory.close()


def _check_no_checkpoint_is_left(config: TrainConfig) -> None:
    """Refuse to start over in a directory whose former launch has checkpoints in another place.

    Raises:
        ValueError: it has; the message names the flag.
    """
    run_dir = Path(config.logging.run_dir)
    former = run_dir / "config.yaml"
    if not (former.is_file() and (run_dir / "metrics.jsonl").is_file()):
        return
    try:
        save = yaml.safe_load(former.read_text(encoding="utf-8")).get("save")
        kept = iterations(str(save)) if save else []
    except (AttributeError, OSError, ValueError, yaml.YAMLError):  # damaged: it names no place
        return
    if kept:
        raise ValueError(
            f"it holds a run whose checkpoints, up to step {kept[-1]}, are in {save}: give --save {save} to go on with "
            "it, or choose another directory"
        )


def _take_directory(config: TrainConfig, start_step: int | None) -> RunDirectory:
    if start_step is None:
        _check_no_checkpoint_is_left(config)
    directory = RunDirectory.create(
        config.logging.run_dir,
        config=to_flags(config),
        resume=start_step is not None,
        defaults=to_flags(TrainConfig()),
    )
    try:
        for teacher in config.teachers:
            directory.teacher(teacher.name, file_of_teacher(teacher))
        directory.rewind(start_step or 0)
    except BaseException:
        directory.close()
        raise
    return directory


def open_files(config: TrainConfig, start_step: int | None) -> RunFiles:
    """Open the run directory and the sinks on rank 0.  Collective over the world.

    Raises:
        ConfigError: on every rank: another run holds the run directory, or it cannot be written.
    """
    directory = on_all_ranks(
        lambda: _take_directory(config, start_step) if is_rank_zero() else None,
        lambda reason: ConfigError([f"--run-dir {config.logging.run_dir}: {reason}"]),
    )
    if directory is None:
        return RunFiles(directory=None, sinks=Sinks({}))
    sinks = make_sinks(
        tensorboard_dir=config.logging.tensorboard_dir, wandb_project=config.logging.wandb_project,
        wandb_exp_name=config.logging.wandb_exp_name,
        config={**to_flags(config), **settings_of_teachers(config.teachers)}, run_dir=Path(config.logging.run_dir),
        start_step=start_step or 0,
    )  # fmt: skip
    return RunFiles(directory=directory, sinks=sinks)
