"""Where the host waits for the GPU: torch's own warnings of synchronising calls, by the line of the product."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from megatron_tropd.parallel import platform

_SYNCHRONIZING = "synchronizing CUDA operation"
_PRODUCT = "megatron_tropd"


def _place() -> str:
    """Return the innermost line of the product on the stack, or of anything else but this file."""
    stack = [frame for frame in traceback.extract_stack() if Path(frame.filename) != Path(__file__)]
    ours = [frame for frame in stack if f"/{_PRODUCT}/" in frame.filename] or stack[:-1]
    frame = ours[-1]
    _, product, inside = frame.filename.rpartition(f"/{_PRODUCT}/")
    file = inside if product else "/".join(Path(frame.filename).parts[-2:])
    return f"{file}:{frame.lineno} {frame.name}"


def host_waits(work: Callable[[], Any]) -> Counter[str]:
    """Return how often the host waited for the GPU during ``work``, by place; nothing on a CPU.

    A wait in the thread that runs backward is reported when backward has ended, and so at its call.
    """
    found: Counter[str] = Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if _SYNCHRONIZING in str(message):
            found[_place()] += 1

    with warnings.catch_warnings(), patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        _under("warn", work)
    return found


def first_wait(work: Callable[[], Any]) -> str:
    """Return where ``work`` raised under torch's mode ``error``; empty if it did not wait for the GPU."""
    try:
        _under("error", work)
    except RuntimeError as error:
        if _SYNCHRONIZING not in str(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if f"/{_PRODUCT}/" in frame.filename] or list(frames)
        return f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].name}"
    return ""


def _under(mode: str, work: Callable[[], Any]) -> None:
    if not platform.is_cuda():
        work()
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
