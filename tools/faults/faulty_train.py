"""The training command with faults inside its ranks at given steps: what a chaos run starts (``chaos.py``).

The environment variable TROPD_CHAOS holds, as JSON, the faults (:class:`chaos_plan.Fault`) and the folder in which a
fault that happens leaves a file ``caused_INDEX``.  Each happens once, also over several launches.  Without the variable
this is the training command.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_tropd import train
from megatron_tropd.parallel import platform
from tools.faults import means
from tools.faults.chaos_plan import Fault

VARIABLE = "TROPD_CHAOS"
_SAVE = "megatron_tropd.checkpoints.save"
_LOOP = "megatron_tropd.training.loop"
_IN_SAVE = {
    ("kill-in-save", 0): ("write_record", ""),  # its shards are written
    ("kill-in-save", 1): ("begin_write", ""),
    ("kill-before-tracker", 0): ("replace_text", "latest_checkpointed"),
    ("full-disk", 1): ("begin_write", ""),
}
"""By kind and rank: the function in whose call the fault happens, and a word of the call's first argument."""


class Faults:
    """The faults of this rank."""

    def __init__(self, folder: Path, faults: list[Fault]) -> None:
        self._folder, self._faults = folder, faults
        self._step = 0

    def install(self) -> None:
        """Change the functions in which they happen."""
        means.replace(f"{_LOOP}:train_step", self._knowing_the_step)
        means.replace(f"{_LOOP}:compute_twice_if_bad", self._in_updates)
        for fault in self._faults:
            if fault.of.where == "save":
                function, word = _IN_SAVE[fault.kind, fault.rank]
                means.replace(f"{_SAVE}:{function}", partial(self._in_saves, fault, word))

    def _knowing_the_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def train_step(run: Any, step: int) -> Any:
            self._step = step + 1
            return original(run, step)

        return train_step

    def _due(self, fault: Fault) -> bool:
        """Return whether a fault happens now; if so, say it once and for all."""
        marker = self._folder / f"caused_{fault.index}"
        if self._step < fault.step or marker.exists():
            return False
        marker.write_text(f"{self._step}\n")
        return True

    def _in_saves(self, fault: Fault, word: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            if (not word or word in str(args[0])) and self._due(fault):
                if fault.kind == "full-disk":
                    means.fill_disk()
                else:
                    means.kill()
            return original(*args, **kwargs)

        return changed

    def _in_updates(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def changed(run: Any, once: Callable[[], Any]) -> Any:
            fault = next((f for f in self._faults if f.of.where == "step" and self._due(f)), None)
            if fault is None:
                return original(run, once)
            damage, _, how_often = fault.kind.partition("-")
            calls = range(1) if how_often == "once" else range(sys.maxsize)
            handle = means.BadNumbers(damage, calls).into(run.student.model.chunks[0])  # type: ignore[arg-type]
            try:
                return original(run, once)
            finally:
                handle.remove()

        return changed


def main() -> int:
    """Run the command line."""
    chaos = json.loads(os.environ.get(VARIABLE, "{}"))
    faults = [Fault(**fault) for fault in chaos.get("faults", [])]
    mine = [fault for fault in faults if fault.rank == int(os.environ.get("RANK", "0"))]
    platform.install()  # before the first import of Megatron
    if mine:
        Faults(Path(chaos["folder"]), mine).install()
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
