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
import functools
import importlib
import itertools
import os
import resource
import signal
import sys

from megatron_tropd.parallel import platform


def _fault(rank: str) -> None:
    if rank == os.environ.get("KILL_RANK"):
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == os.environ.get("FULL_RANK"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    if rank == os.environ.get("FAULT_RANK"):
        raise KeyError("the cause")


def _change(place: str) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, rank = getattr(owner, name), os.environ["LOCAL_RANK"]
    word, on_call = os.environ.get("WITH", ""), int(os.environ.get("ON_CALL", "0"))
    calls = itertools.count(1)

    @functools.wraps(original)
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

    setattr(owner, name, changed)


if __name__ == "__main__":
    platform.install()  # AT may import Megatron
    _change(os.environ["AT"])
    sys.exit(importlib.import_module(os.environ.get("COMMAND", "megatron_tropd.train")).main())
