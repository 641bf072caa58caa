"""The training command on ranks that measure their steps, and with places, what their guards take.

The environment variable TROPD_TIMED holds, as JSON, the folder in which each rank leaves ``rank_N.json`` and whether
the calls of the guards are measured too, which costs a little itself.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_tropd import train
from megatron_tropd.parallel import platform
from tools.faults import means

VARIABLE = "TROPD_TIMED"
PLACES = {
    "spool: begin, with the digest of the weights": "megatron_tropd.training.spool:Spool.begin",
    "digest of the weights (in the line above)": "megatron_tropd.setup.assemble:weights_digest",
    "spool: write the rollouts": "megatron_tropd.training.spool:Spool.add",
    "spool: delete": "megatron_tropd.training.spool:Spool.clear",
    "non-finite and spike guard: judge": "megatron_tropd.training.guard:Guard.judge",
    "rerun: ask whether it is needed": "megatron_tropd.training.guard:Guard.refuses",
    "parity: judge": "megatron_tropd.training.parity:ParityAlarm.judge",
    "stop request: ask all ranks": "megatron_tropd.training.stopping:Stopping.why",
    "lock of the run directory: read it": "megatron_tropd.reporting.lock:RunLock._owner",
    "hang watch: beat and look (thread)": "megatron_tropd.parallel.hang_watch:HangWatch._look",
    "heartbeat: a beat (thread)": "megatron_tropd.reporting.progress.heartbeat:Heartbeat._beat",
}
"""By name, the function whose calls are measured."""


class Times:
    """What this rank measures."""

    def __init__(self) -> None:
        self._steps: list[dict[str, float]] = []
        self._calls: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self._lock = threading.Lock()

    def of_steps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Measure the time between two calls, which is that of a step with all that belongs to it."""

        def train_step(run: Any, step: int) -> Any:
            self._steps.append({"wall": time.perf_counter(), "cpu": time.process_time()})
            return original(run, step)

        return train_step

    def of_calls(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """Measure every call, on the clock and in CPU time of its thread."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                taken = time.perf_counter() - wall, time.thread_time() - cpu
                with self._lock:
                    self._calls[name].append(taken)

        return measured

    def write(self, path: Path) -> None:
        """Write what was measured."""
        path.write_text(json.dumps({"steps": self._steps, "calls": self._calls}))


def main() -> int:
    """Run the command line."""
    settings, times = json.loads(os.environ[VARIABLE]), Times()
    platform.install()  # before the first import of Megatron
    means.replace("megatron_tropd.training.loop:train_step", times.of_steps)
    for name, place in PLACES.items() if settings["guards"] else ():
        means.replace(place, partial(times.of_calls, name))
    code = train.main()
    times.write(Path(settings["folder"]) / f"rank_{os.environ['RANK']}.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
