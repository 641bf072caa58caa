"""A command (COMMAND, or the training command) with a fault or a delay in one local rank; run by tests/test_*_ends.py.

AT names a function or a method, as ``module:Class.method``.  In local rank FAULT_RANK it raises KeyError.  An error that
it raises goes no further in local rank DELAYED_RANK, until torchrun ends this rank because another has ended.  With
NAN_LOSS the guard sees a loss of NaN.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import signal
import sys

from megatron_tropd.parallel import platform


def _change(place: str) -> None:
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, rank = getattr(owner, name), os.environ["LOCAL_RANK"]

    @functools.wraps(original)
    def changed(*args, **kwargs):
        try:
            if rank == os.environ.get("FAULT_RANK"):
                raise KeyError("the cause")
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
