"""When a run saves a checkpoint, what the checkpoint holds, and how a run resumes from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tropd.checkpoints.directory import latest_iteration
from megatron_tropd.checkpoints.load import load_checkpoint
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.save import save_checkpoint
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.fail_together import on_rank_zero
from megatron_tropd.training.student import Student


def resume_origin(config: TrainConfig) -> tuple[str, int] | None:
    """Return the (directory, step) to resume from, or None to start fresh.

    --save is searched before --load, so that the same command, given again, continues its own run.

    Raises:
        CheckpointError: a tracker is damaged, or there is no checkpoint and --exit-on-missing-checkpoint is set.
    """
    for directory in (config.save_dir, config.load_dir):
        iteration = latest_iteration(directory)
        if isinstance(iteration, int):
            return directory, iteration
    if config.checkpoint.exit_on_missing_checkpoint:
        raise CheckpointError(
            f"--load {config.load_dir} holds no checkpoint of a run, and --exit-on-missing-checkpoint is set"
        )
    return None


class Checkpoints:
    """Saves a run's checkpoints on schedule, and loads one when the run resumes."""

    def __init__(self, config: TrainConfig, arch: Architecture, hf_dir: Path, source: str) -> None:
        self._config, self._arch, self._hf_dir, self._source = config, arch, hf_dir, source

    def save_if_due(self, step: int, student: Student, source: PromptSource) -> None:
        """Save after every --save-interval steps and after the last step.  Collective."""
        interval = self._config.checkpoint.save_interval
        if step == self._config.training.train_iters or (interval and step % interval == 0):
            save_checkpoint(
                self._config.save_dir,
                step,
                student.sharded_state_dict(),
                {"weight_version": student.version, "cursor": dict(source.state_dict())},
                arch=self._arch,
                hf_sidecar=self._hf_dir,
                make_vocab_size_divisible_by=student.groups.layout.make_vocab_size_divisible_by,
                source=self._source,
            )

    def resume_step(self) -> int | None:
        """Return the step to resume from; None when there is no checkpoint to load.  Collective.

        Raises:
            CheckpointError: a tracker is damaged, or there is no checkpoint and --exit-on-missing-checkpoint is set.
        """
        origin = on_rank_zero(lambda: resume_origin(self._config), CheckpointError)
        return None if origin is None else origin[1]

    def resume(self, student: Student, source: PromptSource) -> None:
        """Load the saved state of the student and of the prompt cursor.  Collective."""
        origin = on_rank_zero(lambda: resume_origin(self._config), CheckpointError)
        assert origin is not None, "resume_step said there is a checkpoint"
        directory, step = origin
        state, common = load_checkpoint(directory, step, student.sharded_state_dict(is_loading=True), arch=self._arch)
        student.load_state_dict(state, version=int(common["weight_version"]))
        cursor: Any = common["cursor"]
        source.load_state_dict(cursor)
