"""When a run saves a checkpoint, what the checkpoint holds, and how a run resumes from one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_tropd.atomic_files import is_of_the_disk
from megatron_tropd.checkpoints.async_save import AsyncSaver
from megatron_tropd.checkpoints.directory import find_checkpoint, is_being_replaced, iterations, restore_replaced
from megatron_tropd.checkpoints.elsewhere import SavedElsewhere, is_ahead, save_elsewhere
from megatron_tropd.checkpoints.fallback import newest_step, newest_whole, set_aside, with_advice
from megatron_tropd.checkpoints.load import load_checkpoint, open_checkpoint
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.checkpoints.retention import Retention, remove_superseded
from megatron_tropd.checkpoints.run_record import RunRecord, read_run_record
from megatron_tropd.checkpoints.save import save_checkpoint
from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.data.rollout_codec import decode_rollouts, encode_rollouts
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.fail_together import is_rank_zero, on_rank_zero
from megatron_tropd.reporting.lock import LOCK_FILE, RunLock
from megatron_tropd.training.stream import Pending
from megatron_tropd.training.student import Student

log = logging.getLogger(__name__)
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a run resumes from."""

    directory: str
    step: int
    verified: bool = False
    """Whether the digests of its files were compared already."""
    note: str = ""
    """Which newer checkpoints were refused, for people."""


def resume_origin(config: TrainConfig) -> tuple[str, int] | None:
    """Return the (directory, step) to resume from, or None to start fresh.

    --save is searched before --load, so that the same command, given again, continues its own run.  Only an emergency
    save of this run that is newer than what --save has comes first.

    Raises:
        CheckpointError: a tracker is damaged, or there is no checkpoint and --exit-on-missing-checkpoint is set; there
            is none of the step that was asked for.
    """
    if (wanted := config.checkpoint.load_step) is not None:
        if wanted not in (there := iterations(config.load_dir)):
            raise CheckpointError(f"{config.load_dir} has no checkpoint of step {wanted}; it has those of {there}")
        return config.load_dir, wanted
    for directory in _search(config):
        try:
            step = newest_step(directory)
        except CheckpointError as error:
            raise with_advice(error, directory) from error
        if step is not None:
            return directory, step
    _check_missing(config)
    return None


def _search(config: TrainConfig) -> list[str]:
    """Return the directories in which the checkpoint to resume from is looked for, in order."""
    own_first = list(dict.fromkeys((config.save_dir, config.load_dir)))
    return own_first[::-1] if is_ahead(config.load_dir, config.save_dir) else own_first


def _check_missing(config: TrainConfig) -> None:
    if config.checkpoint.exit_on_missing_checkpoint:
        raise CheckpointError(
            f"--load {config.load_dir} holds no checkpoint of a run, and --exit-on-missing-checkpoint is set"
        )


class Checkpoints:
    """Saves a run's checkpoints on schedule, and loads one when the run resumes."""

    def __init__(self, config: TrainConfig, arch: Architecture, hf_dir: Path, source: str) -> None:
        self._config, self._arch, self._hf_dir, self._source = config, arch, hf_dir, source
        self._saver = AsyncSaver() if config.checkpoint.async_save else None
        self._origin: Origin | None = None
        self.message: Callable[[str], None] = log.warning
        """Prints to the user, on rank 0."""
        self.record: RunRecord | None = None
        """What the run is made of, stored with every checkpoint; known when all models are loaded."""

    def due(self, step: int) -> bool:
        """Return whether to save after ``step``: every --save-interval steps, and after the last step."""
        interval = self._config.checkpoint.save_interval
        return step == self._config.training.train_iters or bool(interval and step % interval == 0)

    def save(
        self, step: int, student: Student, source: PromptSource, pending: Pending | None, *, wait: bool = False
    ) -> None:
        """Save the state after ``step`` steps, with the batch that is written but not trained on.  Collective.

        With --async-save the checkpoint is written when :meth:`finish` says so, or with ``wait`` when this returns.

        Raises:
            SavedElsewhere: on every rank: this save failed, or the one before that was still being written, because of
                the disk, and the state is in --emergency-save.
            CheckpointError: on every rank: one of them failed, and the state is nowhere.
        """
        with self.or_elsewhere(step, student, source, lambda: pending):
            self.finish()
            begin = save_checkpoint if self._saver is None else self._saver.start
            begin(self._config.save_dir, step, **self._content(student, source, pending))
            if self._saver is None:
                self._delete_superseded(step)
            elif wait:
                self.finish()

    @contextmanager
    def or_elsewhere(
        self, step: int, student: Student, source: PromptSource, pending: Callable[[], Pending | None]
    ) -> Iterator[None]:
        """Where the block, which saves, fails because of the disk, save the state after ``step`` steps in
        --emergency-save, if that is given.  Collective; what is ``pending`` is asked only then.

        Raises:
            SavedElsewhere: on every rank: that was done.
        """
        try:
            yield
        except CheckpointError as error:
            place = self._config.checkpoint.emergency_save
            if not place or isinstance(error, SavedElsewhere) or not is_of_the_disk(str(error)):
                raise
            content = self._content(student, source, pending())
            save_elsewhere(error, Path(place), Path(self._config.logging.run_dir), self._config.save_dir, step, content)

    def _content(self, student: Student, source: PromptSource, pending: Pending | None) -> dict[str, Any]:
        """Return the arguments of a save besides its place."""
        common: dict[str, Any] = {"weight_version": student.version, "cursor": dict(source.state_dict())}
        if pending is not None:
            common["pending"] = {"step": pending.step, "rollouts": encode_rollouts(pending.rollouts)}
        return {
            "sharded_state_dict": student.sharded_state_dict(),
            "common": common,
            "arch": self._arch,
            "hf_sidecar": self._hf_dir,
            "make_vocab_size_divisible_by": student.groups.layout.make_vocab_size_divisible_by,
            "source": self._source,
            "record": self.record,
        }

    @property
    def in_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._saver is not None and self._saver.in_writing

    def finish(self, *, wait: bool = True) -> None:
        """Make the checkpoint visible that is being written in the background, if there is one; without ``wait`` only
        if all ranks have written it.  Collective.

        Raises:
            CheckpointError: on every rank: it could not be written.
        """
        if self._saver is not None and (step := self._saver.finish(wait=wait)) is not None:
            self._delete_superseded(step)

    def close(self) -> None:
        """Give up a checkpoint that is still being written; not collective."""
        if self._saver is not None:
            self._saver.abandon()

    def _delete_superseded(self, newest: int) -> None:
        if not is_rank_zero():
            return
        settings = self._config.checkpoint
        retention = Retention(last=settings.keep_last, interval=settings.save_retain_interval)
        for warning in remove_superseded(Path(self._config.save_dir), newest, retention):
            self.message(f"warning: {warning}")

    def resume_origin(self) -> Origin | None:
        """Return where to resume from; None when there is no checkpoint to load.  Collective.

        With --fallback-previous it is the newest checkpoint of which every file was verified.

        Raises:
            CheckpointError: a tracker is damaged (with --fallback-previous, every checkpoint is), or there is no
                checkpoint and --exit-on-missing-checkpoint is set.
        """
        on_rank_zero(self._mend, CheckpointError)
        if self._config.checkpoint.fallback_previous:
            self._origin = self._fall_back()
        else:
            found = on_rank_zero(lambda: resume_origin(self._config), CheckpointError)
            self._origin = None if found is None else Origin(directory=found[0], step=found[1])
        return self._origin

    def _mend(self) -> None:
        """Give a checkpoint its name back that a save had moved away when it ended.

        Another job may be just between the two renames, on a file system that cannot exchange names: whoever mends
        holds the lock of the run.
        """
        save_dir = Path(self._config.save_dir)
        if save_dir.is_dir() and is_being_replaced(save_dir):
            run_dir = Path(self._config.logging.run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = RunLock(run_dir / LOCK_FILE)
            try:
                restore_replaced(save_dir)
            finally:
                lock.release()

    def _fall_back(self) -> Origin | None:
        for directory in on_rank_zero(lambda: _search(self._config), CheckpointError):
            if (choice := newest_whole(directory)) is not None:
                if directory == self._config.save_dir and is_rank_zero():
                    set_aside(directory, choice)
                return Origin(directory=directory, step=choice.step, verified=True, note=choice.note)
        _check_missing(self._config)
        return None

    def resume_record(self) -> RunRecord | None:
        """Return what the run that wrote the checkpoint was made of; None where it did not record it.  Collective.

        Raises:
            CheckpointError: the record is damaged.
        """
        origin = self._known_origin()
        return self._advising(
            lambda: on_rank_zero(
                lambda: read_run_record(find_checkpoint(origin.directory, origin.step)), CheckpointError
            )
        )

    def _known_origin(self) -> Origin:
        assert self._origin is not None, "called only after resume_origin has found a checkpoint"
        return self._origin

    def _advising(self, read: Callable[[], Read]) -> Read:
        """Call ``read``, whose errors are of damage and the same on every rank, and add to them what can be done."""
        origin = self._known_origin()
        try:
            return read()
        except CheckpointError as error:
            if origin.verified:
                raise
            text = str(error)
            advised = on_rank_zero(lambda: str(with_advice(CheckpointError(text), origin.directory)), CheckpointError)
            raise CheckpointError(advised) from error

    def resume(self, student: Student, source: PromptSource, *, new_prompts: bool) -> Pending | None:
        """Load the saved state of the student and of the prompt cursor; return the batch that was written but not
        trained on, if there is one.  Collective.

        If --allow-changed-run permits other prompts than those of the checkpoint, ``new_prompts`` start at their
        beginning, and changed ones go on after as many as were taken.
        """
        origin = self._known_origin()
        if not origin.verified:
            self._advising(lambda: open_checkpoint(origin.directory, origin.step))
        state, common = load_checkpoint(
            origin.directory, origin.step, student.sharded_state_dict(is_loading=True), arch=self._arch,
            verify_digests=False,
        )  # fmt: skip
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
