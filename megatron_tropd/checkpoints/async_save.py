"""Write a checkpoint while training goes on, with Megatron's own asynchronous strategy.

    start    copies the state to host memory, plans the files (Megatron's ``save`` with ``async_sharded_save``) and lets
             Megatron's AsyncCallsQueue write them: in a forked process, on a CPU in a thread
    finish   asked at the end of every step: when all ranks have written, Megatron finalizes its files; a thread of
             every rank reads its share of them back for their digests; when all have, the folder gets its name and
             the tracker its iteration, as after a synchronous save

Until then the tracker names the checkpoint before.  One save at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from megatron_tropd.checkpoints.directory import HF_FOLDER
from megatron_tropd.checkpoints.integrity import share_of_records
from megatron_tropd.checkpoints.metadata import CheckpointError, FileRecord
from megatron_tropd.checkpoints.run_record import RunRecord
from megatron_tropd.checkpoints.save import (
    Unpublished,
    begin_write,
    megatrons_reasons,
    state_to_save,
    write_hf_folder,
    write_record,
)
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel import checkpoint_writers
from megatron_tropd.parallel.fail_together import from_all_ranks, on_all_ranks, on_rank_zero

T = TypeVar("T")


class _Task(Generic[T]):
    """A function that runs in a thread, which does not keep the process from ending."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._future: Future[T] = Future()
        threading.Thread(target=self._run, args=(function,), daemon=True).start()

    def _run(self, function: Callable[[], T]) -> None:
        try:
            self._future.set_result(function())
        except BaseException as error:
            self._future.set_exception(error)

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> T:
        return self._future.result()


@dataclass(slots=True, kw_only=True)
class _Saving:
    step: int
    unpublished: Unpublished
    records: _Task[dict[str, FileRecord]] | None = None
    """Once Megatron's files are whole on all ranks."""


class AsyncSaver:
    """Writes one checkpoint at a time in the background.  Both methods are collective."""

    def __init__(self) -> None:
        self._queue = checkpoint_writers.async_calls_queue()
        self._saving: _Saving | None = None

    @property
    def in_writing(self) -> bool:
        """Whether a save was started and is not finished, on all ranks alike."""
        return self._saving is not None

    def start(
        self, save_dir: str | Path, step: int, sharded_state_dict: Mapping[str, Any], common: Mapping[str, Any],
        *, arch: Architecture, hf_sidecar: Path, make_vocab_size_divisible_by: int, source: str,
        record: RunRecord | None,
    ) -> None:  # fmt: skip
        """Begin to save, with the arguments of :func:`save.save_checkpoint`; the state may change when this returns.

        Raises:
            CheckpointError: on every rank; the tracker still names the previous checkpoint.
        """
        assert self._saving is None, "the save before is finished first"
        unpublished = Unpublished.begin(
            save_dir, step, arch=arch, make_vocab_size_divisible_by=make_vocab_size_divisible_by, source=source
        )
        folder = unpublished.folder
        with unpublished.swept_on_failure():
            state = state_to_save(sharded_state_dict, common)
            options = checkpoint_writers.async_save_options()
            request = on_all_ranks(lambda: begin_write(state, folder, **options), CheckpointError)
            write_record(folder, record)
            on_rank_zero(lambda: write_hf_folder(hf_sidecar, None, folder / HF_FOLDER), CheckpointError)
            request = checkpoint_writers.copying(request)
            on_all_ranks(lambda: self._queue.schedule_async_request(request), CheckpointError)
        self._saving = _Saving(step=step, unpublished=unpublished)

    def finish(self, *, wait: bool) -> int | None:
        """Return the step of the checkpoint that became visible in this call; None if none did.

        Without ``wait`` it only looks whether the files are written, and does what is then to be done.

        Raises:
            CheckpointError: on every rank: the save failed on some rank; the tracker still names the previous
                checkpoint.
        """
        saving = self._saving
        if saving is None:
            return None
        try:
            with saving.unpublished.swept_on_failure():
                if not self._is_written(saving, wait):
                    return None
                assert saving.records is not None
                saving.unpublished.publish(saving.records.result)
        except CheckpointError:
            self._saving = None
            raise
        self._saving = None
        return saving.step

    def abandon(self) -> None:
        """End a save that nobody will finish; not collective.  Its process would go on writing, and hold the lock of
        the run directory, after this one."""
        if self._saving is not None:
            checkpoint_writers.end_processes(self._queue)
            self._saving = None

    def _is_written(self, saving: _Saving, wait: bool) -> bool:
        """Return whether all ranks have written and read back their files."""
        folder = saving.unpublished.folder
        if saving.records is None:

            def finalize() -> bool:
                with megatrons_reasons(folder):
                    return bool(self._queue.maybe_finalize_async_calls(blocking=wait))

            if not on_all_ranks(finalize, CheckpointError):
                return False
            saving.records = _Task(lambda: share_of_records(folder, {}))
        return wait or all(from_all_ranks(saving.records.done, CheckpointError))
