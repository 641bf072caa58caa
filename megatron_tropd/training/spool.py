"""The rollouts of an unfinished batch, on disk as they finish: a launch that goes on need not write them again.

Every rank on which rollouts arrive appends them to a file of its own in RUN_DIR/unfinished.  The file's name has a
digest of all that the batch depends on: the weights themselves, their version, the requests and how tokens are drawn.
So a rollout is used again only with the weights that wrote it.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.data.rollout_codec import decode_rollouts, encode_rollouts
from megatron_tropd.parallel.exchange import failures_elsewhere
from megatron_tropd.parallel.fail_together import is_rank_zero, on_rank_zero
from megatron_tropd.record_files import RecordFile, read_records
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.types import GenerationRequest, Rollout

FOLDER = "unfinished"
_FILES = "*.rollouts"
"""Their records are rollouts, by index of the request."""


class Spool:
    """Keeps the finished rollouts of one batch at a time.

    Args:
        folder: of the files; made when there is something to write.
        weights: digest of the weights that write; collective.
        settings: a text of every other setting that a rollout depends on.
        say: shows a line on rank 0.
    """

    def __init__(self, folder: Path, weights: Callable[[], str], settings: str, say: Callable[[str], None]) -> None:
        self._folder, self._weights, self._settings, self._say = folder, weights, settings, say
        self._lock = threading.Lock()
        self._file: RecordFile | None = None
        self._failure = ""
        """Of this rank in the last batch; the first rank shows its own at once, and those of others at the next one."""

    def begin(
        self, requests: Sequence[GenerationRequest], sampling: SamplingParams, version: int
    ) -> dict[int, Rollout]:
        """Begin a batch; return its rollouts that an earlier launch finished, by request.  Collective."""
        text = repr((self._weights(), version, self._settings, sampling, list(requests)))
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        rank = dist.get_rank() if dist.is_initialized() else 0
        with self._lock:
            self._forget()
            failure, self._failure = self._failure, ""
            self._file = RecordFile(self._folder / f"{key}.{rank}.{time.time_ns():x}.rollouts")
        if others := failures_elsewhere(failure):
            self._say(f"warning: unfinished rollouts were not kept {others}")
        found = on_rank_zero(lambda: self._read(key, requests, sampling, version))
        if found:
            self._say(
                f"step {sampling.step + 1}: {len(found)} of {len(requests)} rollouts were finished by an earlier launch"
            )
        return found

    def add(self, found: Mapping[int, Rollout]) -> None:
        """Keep finished rollouts, by request.  May be called in any thread.  What cannot be written is not kept."""
        with self._lock:
            if self._file is None:
                return
            try:
                self._file.add(
                    (index, encode_rollouts([rollout]).numpy().tobytes()) for index, rollout in found.items()
                )
            except OSError as error:
                self._failure = f"{self._file.path}: {error}"
                self._say(f"warning: unfinished rollouts are not kept: {self._failure}")
                self._forget()

    def clear(self) -> None:
        """Delete what was kept of the batch, by earlier launches too: it is trained on, or nobody shall train on it."""
        with self._lock:
            self._forget()
        if is_rank_zero():
            with contextlib.suppress(OSError):  # what is left belongs to no batch any more
                for path in self._folder.glob(_FILES):
                    path.unlink(missing_ok=True)

    def _forget(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.delete()

    def _read(
        self, key: str, requests: Sequence[GenerationRequest], sampling: SamplingParams, version: int
    ) -> dict[int, Rollout]:
        """Return what fits the batch, and delete what belongs to another one.  What cannot be read is written again."""
        found: dict[int, Rollout] = {}
        for path in sorted(self._folder.glob(_FILES)):
            with contextlib.suppress(OSError, ValueError):
                if path.name.split(".")[0] != key:
                    path.unlink(missing_ok=True)
                    continue
                for record in read_records(path):
                    index, (rollout,) = record.number, decode_rollouts(record.data)
                    if index < len(requests) and _fits(rollout, requests[index], sampling, version):
                        found[index] = rollout
        return found


def _fits(rollout: Rollout, request: GenerationRequest, sampling: SamplingParams, version: int) -> bool:
    width = 0 if rollout.topk_ids is None else rollout.topk_ids.shape[1]
    return (
        (rollout.prompt_uid, rollout.sample_index) == (request.prompt_uid, request.sample_index)
        and rollout.token_ids[: len(request.token_ids)] == request.token_ids
        and rollout.weight_version == (version, version)
        and (width == sampling.report_top_k or not rollout.logprobs)
    )
