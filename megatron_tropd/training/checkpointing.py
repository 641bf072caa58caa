"""When a run saves a checkpoint, what the checkpoint holds, and how a run resumes from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tropd.checkpoints.directory import find_checkpoint, latest_iteration
from megatron_tropd.checkpoints.load import load_checkpoint
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.run_record import RunRecord, read_run_record
from megatron_tropd.checkpoints.save import save_checkpoint
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.data.rollout_codec import decode_rollouts, encode_rollouts
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.fail_together import on_rank_zero
from megatron_tropd.training.stream import Pending
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
        self.record: RunRecord | None = None
        """What the run is made of, stored with every checkpoint; known when all models are loaded."""

    def due(self, step: int) -> bool:
        """Return whether to save after ``step``: every --save-interval steps, and after the last step."""
        interval = self._config.checkpoint.save_interval
        return step == self._config.training.train_iters or bool(interval and step % interval == 0)

    def save(self, step: int, student: Student, source: PromptSource, pending: Pending | None) -> None:
        """Save the state after ``step`` steps, with the batch that is written but not trained on.  Collective."""
        common: dict[str, Any] = {"weight_version": student.version, "cursor": dict(source.state_dict())}
        if pending is not None:
            common["pending"] = {"step": pending.step, "rollouts": encode_rollouts(pending.rollouts)}
        save_checkpoint(
            self._config.save_dir,
            step,
            student.sharded_state_dict(),
            common,
            arch=self._arch,
            hf_sidecar=self._hf_dir,
            make_vocab_size_divisible_by=student.groups.layout.make_vocab_size_divisible_by,
            source=self._source,
            record=self.record,
        )

    def resume_origin(self) -> tuple[str, int] | None:
        """Return the (directory, step) to resume from; None when there is no checkpoint to load.  Collective.

        Raises:
            CheckpointError: a tracker is damaged, or there is no checkpoint and --exit-on-missing-checkpoint is set.
        """
        return on_rank_zero(lambda: resume_origin(self._config), CheckpointError)

    def resume_record(self) -> RunRecord | None:
        """Return what the run that wrote the checkpoint was made of; None where it did not record it.  Collective.

        Raises:
            CheckpointError: the record is damaged.
        """
        directory, step = self._origin()
        return on_rank_zero(lambda: read_run_record(find_checkpoint(directory, step)), CheckpointError)

    def _origin(self) -> tuple[str, int]:
        origin = self.resume_origin()
        assert origin is not None, "called only where there is a checkpoint"
        return origin

    def resume(self, student: Student, source: PromptSource, *, new_prompts: bool) -> Pending | None:
        """Load the saved state of the student and of the prompt cursor; return the batch that was written but not
        trained on, if there is one.  Collective.

        If --allow-changed-run permits other prompts than those of the checkpoint, ``new_prompts`` start at their
        beginning, and changed ones go on after as many as were taken.
        """
        directory, step = self._origin()
        state, common = load_checkpoint(directory, step, student.sharded_state_dict(is_loading=True), arch=self._arch)
        student.load_state_dict(state, version=int(common["weight_version"]))
        cursor: Any = common["cursor"]
        digest = source.state_dict()["digest"]
        if cursor["digest"] != digest and self._config.checkpoint.allow_changed_run:
            cursor = {"consumed": 0 if new_prompts else cursor["consumed"], "digest": digest}
        source.load_state_dict(cursor)
        pending: Any = common.get("pending")
        if pending is None or new_prompts:
            return None
        return Pending(step=int(pending["step"]), rollouts=decode_rollouts(pending["rollouts"]))
