"""What a rank can see of the torchrun that started it."""

from __future__ import annotations

import os

import psutil


def has_lost_a_rank() -> bool:
    """Return whether fewer ranks live on this node than torchrun started here.

    torchrun sends SIGTERM to its ranks in two cases: it got a signal itself, or one of them has ended.  In the second
    the rank is gone, or a zombie, before the signal is sent.  Ranks are the children of torchrun with the command line
    of this process.  False where torchrun did not start this process.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    mine = psutil.Process()
    try:
        siblings = mine.parent().children()
        command = mine.cmdline()
    except (psutil.Error, AttributeError):  # torchrun itself is gone
        return True
    return sum(_is_alive(process, command) for process in siblings) < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _is_alive(process: psutil.Process, command: list[str]) -> bool:
    try:
        return process.cmdline() == command
    except psutil.Error:  # it ended since it was listed, or is a zombie, which has no command line
        return False
