"""A command (COMMAND, or the training command) with a fault or a delay in one local rank; run by tests of how jobs end.

AT names a function or a method, as ``module:Class.method``.  Of its calls those count that have WITH in their first
argument; ON_CALL is the number of the one at which the faults happen, from 1 on (default: all).  Then

- local rank FAULT_RANK raises KeyError,
- local rank KILL_RANK is killed,
- local rank FULL_RANK can from then on write no file of more than 1000 bytes, as on a full disk.

An error that it raises goes no further in local rank DELAYED_RANK, until torchrun ends this rank because another has
ended.  With NAN_LOSS the guard sees a loss of NaN.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import signal
import sys
from collections.abc import Callable

from megatron_tropd.parallel import platform
from tools.faults import means


def _fault(rank: str) -> None:
    if rank == os.environ.get("KILL_RANK"):
        means.kill()
    if rank == os.environ.get("FULL_RANK"):
        means.fill_disk()
    if rank == os.environ.get("FAULT_RANK"):
        raise KeyError("the cause")


def _changing(original: Callable[..., object]) -> Callable[..., object]:
    rank = os.environ["LOCAL_RANK"]
    word, on_call = os.environ.get("WITH", ""), int(os.environ.get("ON_CALL", "0"))
    calls = itertools.count(1)

    def changed(*args, **kwargs):
        try:
            if word in str(args[:1]) and (next(calls) == on_call or not on_call):
                _fault(rank)
            if "NAN_LOSS" in os.environ:
                args = (args[0], dataclasses.replace(args[1], loss=float("nan")))
            return original(*args, **kwargs)
        except Exception:
            while rank == os.environ.get("DELAYED_RANK"):
                signal.pause()
            raise

    return changed


if __name__ == "__main__":
    platform.install()  # AT may import Megatron
    means.replace(os.environ["AT"], _changing)
    sys.exit(importlib.import_module(os.environ.get("COMMAND", "megatron_tropd.train")).main())
