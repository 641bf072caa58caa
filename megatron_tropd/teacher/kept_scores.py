"""The scores of an unfinished batch, on disk: a launch that goes on need not ask a frozen model for them again.

Scores follow from a rollout, from what is asked and from the model that is asked, so each record is named by a digest
of these, and it does not matter which rank or which launch wrote it.  A rank writes to a file of its own: the scores of
the rollouts that it trains on when the batch is scored or, where the model is on servers, each answer to what it asked
as soon as it is there.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megatron_tropd.data.rollout_codec import encode_rollouts
from megatron_tropd.parallel.exchange import failures_elsewhere, gather_objects
from megatron_tropd.parallel.fail_together import is_rank_zero
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.record_files import RecordFile, read_record, read_records
from megatron_tropd.teacher.routing import payload, payloads, route
from megatron_tropd.teacher.scorer import Destination, Scorer
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores

_FILES = "*.scores"
"""STEP.RANK.TIME.scores; a record is a key and the scores, its number the rollout's index in the batch."""
_KEY_BYTES = 32


class ScoreStore:
    """The files of all scorers of a run.  Its methods may be called in any thread.

    Args:
        folder: of the files; made when there is something to write.
        say: shows a line on rank 0.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.say = say
        self._folder, self._lock = folder, threading.Lock()
        self._places: dict[bytes, tuple[Path, int]] | None = None
        """Where each record begins; None before the files were read."""
        self._files: dict[int, RecordFile | None] = {}
        """By step; None where one cannot be written."""
        self._trained = -1
        self._failure, self._shown = "", False
        """The first of this rank, and whether all ranks were told; the first rank shows its own at once."""

    def empty(self) -> bool:
        """Whether no earlier launch left anything to find."""
        with self._lock:
            if self._places is None:
                self._places = self._read_all()
            return not self._places

    def _read_all(self) -> dict[bytes, tuple[Path, int]]:
        found = {}
        for path in sorted(self._folder.glob(_FILES)):
            with suppress(OSError):
                for record in read_records(path):
                    found[record.data[:_KEY_BYTES]] = (path, record.start)
        return found

    def find(self, key: bytes) -> bytes | None:
        """Return what is kept under ``key``; None if there is nothing, or it cannot be read."""
        with self._lock:
            place = (self._places or {}).get(key)
        if place is not None:
            with suppress(OSError):
                record = read_record(*place)
                if record is not None and record.data.startswith(key):
                    return record.data[_KEY_BYTES:]
        return None

    def add(self, step: int, found: Mapping[int, tuple[bytes, bytes]]) -> None:
        """Keep (key, scores) of rollouts of batch ``step``, by index.  What cannot be written is not kept."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        with self._lock:
            path = self._folder / f"{step}.{rank}.{time.time_ns():x}.scores"
            file = self._files.setdefault(step, RecordFile(path)) if step > self._trained else None
            if file is None:
                return
            try:
                file.add((index, key + data) for index, (key, data) in found.items())
            except OSError as error:
                file.delete()
                self._files[step] = None
                if not self._failure:
                    self._failure = f"{file.path}: {error}"
                    self.say(f"warning: scores of unfinished batches are not kept: {self._failure}")

    def show_failures(self) -> None:
        """Show the first failure of other ranks, once.  Collective."""
        if not self._shown and (others := failures_elsewhere(self._failure)):
            self.say(f"warning: scores of unfinished batches are not kept {others}")
            self._shown = True

    def clear(self, step: int | None = None) -> None:
        """Delete what was kept, by earlier launches too: batch ``step`` is trained on, and only the scores of the next
        one may be needed, which --rollout-lag has scored meanwhile.  Without ``step`` nobody shall use any."""
        following = None if step is None else step + 1
        with self._lock:
            self._places = {}
            self._trained = self._trained if step is None else step
            for own in [own for own in self._files if own != following]:
                if (file := self._files.pop(own)) is not None:
                    file.delete()
        if is_rank_zero():
            with suppress(OSError):
                for path in self._folder.glob(_FILES):
                    if path.name.split(".")[0] != str(following):
                        path.unlink(missing_ok=True)


class KeptScores:
    """Implements Scorer with another one, which is asked only for what is not on disk.

    Hidden states are too large to be kept: a batch that asks for them is scored again.

    Args:
        scorer: that is asked.
        store: of the run.
        who: the model, for people.
        identity: all that its scores depend on besides the rollout and what is asked: weights, precision, vocabulary.
        whole_batches: whether scores have the same bits only in the same micro-batches, so that all are used or none.
        as_they_finish: whether the scorer calls :meth:`keep` itself for each rollout that it has scored.
    """

    def __init__(
        self, scorer: Scorer, store: ScoreStore, *, who: str, identity: str, whole_batches: bool = False,
        as_they_finish: bool = False,
    ) -> None:  # fmt: skip
        self._scorer, self._store, self._who, self._identity = scorer, store, who, identity
        self._whole_batches, self._as_they_finish = whole_batches, as_they_finish
        self._lock = threading.Lock()
        self._held: dict[int, dict[int, TeacherScores]] = {}
        """By step and index: what was on disk, on the rank where the rollout arrived."""

    @property
    def hidden_like(self) -> Tensor | None:
        """See Scorer."""
        return self._scorer.hidden_like

    def _key(self, rollout: Rollout, want: ScoreRequest) -> bytes:
        state = hashlib.sha256(repr((self._identity, want)).encode())
        state.update(encode_rollouts([rollout]).numpy().tobytes())
        return state.digest()

    def _find(self, rollout: Rollout, want: ScoreRequest) -> TeacherScores | None:
        data = self._store.find(self._key(rollout, want))
        return None if data is None else _decode(data, rollout, want)

    def submit(self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest) -> None:
        """See Scorer; only what is not on disk goes on to the scorer."""
        if not want.hidden and not self._store.empty():
            looked = {index: self._find(rollout, want) for index, rollout in rollouts.items()}
            found = {index: scores for index, scores in looked.items() if scores is not None}
            with self._lock:
                self._held.setdefault(step, {}).update(found)
            rollouts = {index: rollout for index, rollout in rollouts.items() if index not in found}
        if rollouts:
            self._scorer.submit(step, rollouts, want)

    def scores(
        self, step: int, rollouts: Mapping[int, Rollout], want: ScoreRequest, destination: Destination
    ) -> dict[int, TeacherScores]:
        """See Scorer; the scorer is not called where everything is on disk."""
        if want.hidden:
            return self._scorer.scores(step, rollouts, want, destination)
        self._store.show_failures()
        with self._lock:
            held = self._held.pop(step, {})
        # Of each its number of tokens with a top-k, None for all: every rank has to know what is sent.
        everyone = gather_objects(
            {index: None if scores.topk_rows is None else len(scores.topk_rows) for index, scores in held.items()}
        )
        sources = {index: rank for rank, part in enumerate(everyone) for index in part}
        if self._whole_batches and len(sources) < len(rollouts):
            sources = {}
        asked = {index: rollout for index, rollout in rollouts.items() if index not in sources}
        scored = self._scorer.scores(step, asked, want, destination) if asked else {}
        if destination.groups.reports_replica and not self._as_they_finish:
            for index, scores in scored.items():
                self.keep(step, index, rollouts[index], want, scores)
        if not sources:
            return scored
        self._store.say(
            f"step {step + 1}: the {self._who} scored {len(sources)} of {len(rollouts)} rollouts in an earlier launch"
        )
        kept = {index: rollout for index, rollout in rollouts.items() if index in sources}
        rows = {index: count for part in everyone for index, count in part.items() if count is not None}
        found = scored | route(held, sources, kept, payloads(kept, want, None, rows), destination)
        return {index: found[index] for index in rollouts if index in found}

    def keep(self, step: int, index: int, rollout: Rollout, want: ScoreRequest, scores: TeacherScores) -> None:
        """Keep the scores of one rollout; may be called in any thread."""
        self._store.add(step, {index: (self._key(rollout, want), _encode(scores))})

    def logprobs_of(self, sequences: Sequence[Sequence[int]], *, vocab_size: int) -> list[list[float]]:
        """See Scorer."""
        return self._scorer.logprobs_of(sequences, vocab_size=vocab_size)

    def output_rows(self, student: ModelGroups, padded_vocab_size: int) -> Tensor | None:
        """See Scorer."""
        return self._scorer.output_rows(student, padded_vocab_size)

    def metrics(self) -> dict[str, float]:
        """See Scorer: of what was asked."""
        return self._scorer.metrics()

    def close(self) -> None:
        """See Scorer; the files stay."""
        self._scorer.close()


def _encode(scores: TeacherScores) -> bytes:
    parts = {field.name: getattr(scores, field.name) for field in fields(scores)}
    # Cloned: parts of larger tensors would be saved with the whole of their storage.
    tensors = {name: part.detach().cpu().contiguous().clone() for name, part in parts.items() if part is not None}
    return bytes(save(tensors))


def _decode(data: bytes, rollout: Rollout, want: ScoreRequest) -> TeacherScores | None:
    """Return the scores; None if they are not of the size that all ranks will expect."""
    with suppress(SafetensorError, ValueError, TypeError):
        parts = load(data)
        rows = len(parts["topk_rows"]) if "topk_rows" in parts else None
        expected = {name: (spec.shape, spec.dtype) for name, spec in payload(rollout, want, None, rows).items()}
        if {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == expected:
            return TeacherScores(**parts)
    return None
