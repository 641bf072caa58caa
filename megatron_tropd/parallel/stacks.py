"""What the threads of this process are doing."""

from __future__ import annotations

import sys
import threading
import traceback
from pathlib import Path

_PACKAGE = __name__.split(".")[0]


def all_stacks() -> str:
    """Return the Python stack of every other thread, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != threading.get_ident()}
    return "\n".join(
        f"thread {names.get(ident, 'of no Python name')}:\n{''.join(traceback.format_stack(frames[ident])).rstrip()}"
        for ident in sorted(frames, key=lambda ident: ident != main)
    )


def place_of_main_thread() -> str:
    """Return the innermost place of the main thread in this package, such as ``training/step.py:12, forward``; "" if
    it is in none."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] != _PACKAGE:
        frame = frame.f_back
    if frame is None:
        return ""
    parts = Path(frame.f_code.co_filename).parts
    inside = parts[len(parts) - parts[::-1].index(_PACKAGE) :] if _PACKAGE in parts else parts[-1:]
    return f"{'/'.join(inside)}:{frame.f_lineno}, {frame.f_code.co_name}"
