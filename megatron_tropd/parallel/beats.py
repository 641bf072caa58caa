"""What ranks say of themselves while they work, and when that means a hang.  Pure: time is given."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from megatron_tropd.types import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What a rank does at one moment."""

    rank: int
    """In the job."""
    host: str
    pid: int
    number: int
    """Counts the beats of the rank."""
    step: int
    phase: str
    seconds: float
    """In this phase."""
    counts: Counts | None
    ended: bool = False
    """The rank has left its loop; it is not watched any more."""

    @property
    def progress(self) -> tuple[object, ...]:
        """Changes when the rank gets on."""
        return self.step, self.phase, self.counts

    def encode(self) -> str:
        """Return the beat as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, line: str | bytes) -> Beat:
        """Return the beat of :meth:`encode`."""
        values = json.loads(line)
        counts = values.pop("counts")
        return cls(**values, counts=None if counts is None else Counts(**counts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """A job that does not get on."""

    silent: Mapping[int, float]
    """Ranks that no longer beat, and seconds since their last beat; none if all beat and none gets on."""
    unchanged_s: float
    """Seconds since any rank got on."""


class Judge:
    """Tells a hang from work, by the beats of all ranks.

    Args:
        ranks: of the job; one that never beats is silent from the first look on.
        silence_s: a rank whose beats stay away for longer is lost or stopped; 0: never.
        stuck_s: a job of which no rank gets on for longer is stuck, though all beat; 0: never.
    """

    def __init__(self, ranks: Iterable[int], silence_s: float, stuck_s: float) -> None:
        self._ranks, self._silence_s, self._stuck_s = tuple(ranks), silence_s, stuck_s
        self._heard: dict[int, tuple[int, float]] = {}
        self._moved: tuple[object, float] = (None, 0.0)
        self._looked = 0.0

    def look(self, beats: Mapping[int, Beat], now_s: float) -> Hang | None:
        """Return what is wrong at ``now_s``, given the latest beat of every rank that has made one."""
        self._excuse_own_absence(now_s)
        for rank in self._ranks:
            number = beats[rank].number if rank in beats else 0
            if rank not in self._heard or self._heard[rank][0] != number:
                self._heard[rank] = number, now_s
        watched = [rank for rank in self._ranks if rank not in beats or not beats[rank].ended]
        silent = {rank: now_s - self._heard[rank][1] for rank in watched}
        silent = {rank: seconds for rank, seconds in silent.items() if self._silence_s and seconds > self._silence_s}
        progress = sorted((rank, repr(beat.progress), beat.ended) for rank, beat in beats.items())
        if self._moved[0] != progress:
            self._moved = progress, now_s
        unchanged_s = now_s - self._moved[1]
        if silent or (watched and self._stuck_s and unchanged_s > self._stuck_s):
            return Hang(silent=silent, unchanged_s=unchanged_s)
        return None

    def _excuse_own_absence(self, now_s: float) -> None:
        """Do not count the time in which this process itself stood still: a stopped container makes no rank silent."""
        absent = now_s - self._looked
        deadlines = [seconds for seconds in (self._silence_s, self._stuck_s) if seconds]
        if self._looked and deadlines and absent > min(deadlines) / 2:
            self._heard = {rank: (number, at + absent) for rank, (number, at) in self._heard.items()}
            self._moved = self._moved[0], self._moved[1] + absent
        self._looked = now_s


def describe(hang: Hang, beats: Mapping[int, Beat], places: Mapping[int, str]) -> str:
    """Return what to print of a hang: who is silent, who waits, in which phase, since when and where in the code.

    ``places`` has, of the ranks that still answer, the place of their main thread in our code.
    """
    if hang.silent:
        lines = [f"Hang: {_list_of(hang.silent)} no longer answer{'s' if len(hang.silent) == 1 else ''}"]
        for rank, seconds in sorted(hang.silent.items()):
            beat = beats.get(rank)
            who = f"rank {rank}" if beat is None else f"rank {rank} ({beat.host}, pid {beat.pid})"
            last = "it has not begun" if beat is None else f"last in {_doing(beat)}"
            lines.append(
                f"  {who}: silent for {seconds:.0f} s; {last}: its process is stopped, its machine is lost, or code "
                "holds Python's interpreter lock"
            )
    else:
        lines = [f"Hang: all ranks answer, and none has got on for {hang.unchanged_s:.0f} s"]
    waiting = [beat for rank, beat in sorted(beats.items()) if rank not in hang.silent and not beat.ended]
    groups: dict[tuple[str, str], list[Beat]] = {}
    for beat in waiting:
        groups.setdefault((_doing(beat), places.get(beat.rank, "")), []).append(beat)
    for (doing, place), group in groups.items():
        seconds = max(beat.seconds for beat in group)
        where = f", at {place}" if place else ""
        lines.append(f"  {_list_of([beat.rank for beat in group])}: in {doing} for {seconds:.0f} s{where}")
    return "\n".join(lines)


def _doing(beat: Beat) -> str:
    done = "" if beat.counts is None else f" ({beat.counts.done} of {beat.counts.total} {beat.counts.unit})"
    return f"step {beat.step}, {beat.phase or 'between phases'}{done}"


def _list_of(ranks: Mapping[int, float] | list[int]) -> str:
    """``rank 3``, or ``ranks 0-2, 5``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(ranks) > 1 else ''} {text}"
