"""What rank 0 holds open while a run goes on: the run directory and the sinks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.cli import ConfigError, to_flags
from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.reporting.run_directory import RunDirectory
from megatron_tropd.reporting.sinks import Sinks, make_sinks


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """Empty on every rank but the first."""

    directory: RunDirectory | None
    sinks: Sinks

    def close(self) -> None:
        """Give them back."""
        self.sinks.close()
        if self.directory is not None:
            self.directory.close()


def open_files(config: TrainConfig, start_step: int | None) -> RunFiles:
    """Rank 0 takes the run directory; all ranks fail alike when it cannot.  Collective over the world.

    Raises:
        ConfigError: another run holds the directory, or it cannot be written.
    """
    directory, failure = None, ""
    if dist.get_rank() == 0:
        try:
            directory = RunDirectory.create(
                config.logging.run_dir,
                config=to_flags(config),
                resume=start_step is not None,
                defaults=to_flags(TrainConfig()),
            )
            directory.rewind(start_step or 0)
        except (OSError, ValueError, RuntimeError) as error:
            failure = str(error)
    if failure := next(filter(None, gather_objects(failure)), ""):
        RunFiles(directory=directory, sinks=Sinks({})).close()
        raise ConfigError([f"--run-dir {config.logging.run_dir}: {failure}"])
    if directory is None:
        return RunFiles(directory=None, sinks=Sinks({}))
    sinks = make_sinks(
        tensorboard_dir=config.logging.tensorboard_dir, wandb_project=config.logging.wandb_project,
        wandb_exp_name=config.logging.wandb_exp_name, config=to_flags(config), run_dir=Path(config.logging.run_dir),
        start_step=start_step or 0,
    )  # fmt: skip
    return RunFiles(directory=directory, sinks=sinks)
