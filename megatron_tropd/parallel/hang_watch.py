"""Watches that every rank of a job gets on, and ends the job with all stacks when one does not.

Every rank has a thread that leaves a beat in the job's store.  Two of them, on two machines where there are two, read
all beats and judge.  A hang is found by a deadline of its own, sooner than by the timeout of the collective in which
the other ranks wait, and the message says who is waited for.

The thread runs while the main thread is inside a collective or waits for a GPU.  It does not in a stopped process, nor
while code holds Python's interpreter lock: such a rank is silent.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.parallel.beats import Beat, Hang, Judge, describe
from megatron_tropd.parallel.stacks import all_stacks, place_of_main_thread
from megatron_tropd.types import Counts

_VERDICT, _REPORT = "hang/verdict", "hang/report"
_LONGEST_PAUSE_S = 10.0
_FAILURES_IN_A_ROW = 3
_ANSWER_S = 5.0
"""How long a judge waits for the stacks of the other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Doing:
    """What a rank does now, as its beats tell it."""

    step: int
    phase: str
    seconds: float
    counts: Counts | None = None


class HangError(RuntimeError):
    """The job hangs; the text says who is waited for, in which phase and since when."""


class HangWatch:
    """Watches the ranks of the job from :meth:`start` to :meth:`stop`.

    Args:
        rank: this process, in the job.
        judges: ranks that judge; the second and later ones only where all before them are silent.
        world_size: ranks of the job.
        connect: makes a connection to the store, which the thread alone uses.
        doing: says what this rank does; called in the thread.
        silence_s, stuck_s: the deadlines of :class:`Judge`.
        folder: where a judge writes the stacks of all ranks.
        end: reports the error and ends this process.
    """

    def __init__(
        self, rank: int, world_size: int, judges: list[int], connect: Callable[[], dist.Store],
        doing: Callable[[], Doing], *, silence_s: float, stuck_s: float, folder: Path,
        end: Callable[[HangError], None],
    ) -> None:  # fmt: skip
        self._rank, self._world_size, self._judges, self._connect = rank, world_size, judges, connect
        self._doing, self._folder, self._end = doing, folder, end
        self._judge = Judge(range(world_size), silence_s, stuck_s)
        deadlines = [seconds for seconds in (silence_s, stuck_s) if seconds]
        self._pause_s = min(_LONGEST_PAUSE_S, *(seconds / 8 for seconds in deadlines)) if deadlines else 0.0
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._number = 0
        self._seen: set[int] = set()

    def start(self) -> None:
        """Begin to beat, unless there is no deadline."""
        if self._pause_s:
            self._thread = threading.Thread(target=self._run, name="hang-watch", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Tell the others that this rank is not to be watched any more, and end the thread."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join(_ANSWER_S)
            self._thread = None

    def _run(self) -> None:
        """Beat until the end.  A store that does not answer once is asked anew: without its beats this rank would be
        taken for dead.  One that never answers again is gone, and with it the job."""
        failures = 0
        while failures < _FAILURES_IN_A_ROW:
            try:
                store = self._connect()
                self._beat(store)
                while not self._stopped.wait(self._pause_s):
                    if self._look(store):
                        return
                    failures = 0
                self._beat(store, ended=True)
                return
            except (RuntimeError, OSError):
                failures += 1

    def _look(self, store: dist.Store) -> bool:
        """Beat, and end this process if the job hangs; returns whether it ended, which only a test sees."""
        self._beat(store)
        if store.check([_VERDICT]):
            self._answer(store)
            return True
        if self._rank in self._judges and (hang := self._judged(store)):
            self._accuse(store, hang)
            return True
        return False

    def _beat(self, store: dist.Store, *, ended: bool = False) -> None:
        now = self._doing()
        self._number += 1
        beat = Beat(
            rank=self._rank, host=socket.gethostname(), pid=os.getpid(), number=self._number, step=now.step,
            phase=now.phase, seconds=now.seconds, counts=now.counts, ended=ended,
        )  # fmt: skip
        store.set(f"beat/{self._rank}", beat.encode())

    def _beats(self, store: dist.Store) -> dict[int, Beat]:
        for rank in set(range(self._world_size)) - self._seen:
            if store.check([f"beat/{rank}"]):
                self._seen.add(rank)
        return {rank: Beat.decode(store.get(f"beat/{rank}")) for rank in sorted(self._seen)}

    def _judged(self, store: dist.Store) -> Hang | None:
        hang = self._judge.look(self._beats(store), time.monotonic())
        before = self._judges[: self._judges.index(self._rank)]
        if hang is None or not all(rank in hang.silent for rank in before):
            return None
        return hang

    def _accuse(self, store: dist.Store, hang: Hang) -> None:
        """Ask all ranks for their stacks, write them down, say what is wrong, and end."""
        store.set(_VERDICT, str(self._rank))
        beats = self._beats(store)
        asked = [rank for rank, beat in beats.items() if rank not in (self._rank, *hang.silent) and not beat.ended]
        answers = {self._rank: self._own_answer()} | self._answers(store, asked)
        text = describe(hang, beats, {rank: answer["place"] for rank, answer in answers.items()})
        text += self._write_stacks(answers)
        store.set(_REPORT, text)
        self._end(HangError(text))

    def _answers(self, store: dist.Store, asked: list[int]) -> dict[int, Mapping[str, str]]:
        deadline, found = time.monotonic() + _ANSWER_S + 2 * self._pause_s, {}
        while asked and time.monotonic() < deadline:
            for rank in list(asked):
                if store.check([f"hang/{rank}"]):
                    found[rank] = json.loads(store.get(f"hang/{rank}"))
                    asked.remove(rank)
            time.sleep(0.05)
        return found

    def _own_answer(self) -> Mapping[str, str]:
        return {"place": place_of_main_thread(), "stacks": all_stacks()}

    def _write_stacks(self, answers: Mapping[int, Mapping[str, str]]) -> str:
        path = self._folder / f"hang_{time.strftime('%Y%m%d_%H%M%S')}.txt"
        try:
            path.write_text("\n\n".join(f"rank {rank}\n{a['stacks']}" for rank, a in sorted(answers.items())) + "\n")
        except OSError as error:
            return f"\nThe stacks of the ranks are lost: {path} cannot be written: {error}"
        return f"\nThe stacks of the ranks that answer are in {path}"

    def _answer(self, store: dist.Store) -> None:
        """Send the stacks to the judge that asks for them, and end when it has said what is wrong."""
        store.set(f"hang/{self._rank}", json.dumps(self._own_answer()))
        deadline = time.monotonic() + 2 * (_ANSWER_S + 2 * self._pause_s)
        while time.monotonic() < deadline and not store.check([_REPORT]):
            time.sleep(0.05)
        text = store.get(_REPORT).decode() if store.check([_REPORT]) else "Hang: another rank found it"
        self._end(HangError(text))
