"""Starts one SGLang server.  Runs in SGLang's own environment, so it imports nothing of this package; but the server's
workers can, for a custom weight loader: it is on their path, behind everything that is installed there.

Standard input carries one JSON line with the keys (``{}`` for none), and then stays open: when it closes,
the trainer is gone, however it died, and the server ends with its whole process group.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    meeting = os.environ.get("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", "")
    if meeting.startswith("file://") and "/tropd-sglang-" in meeting:  # of the trainer, which is gone, for this server
        Path(meeting.removeprefix("file://")).unlink(missing_ok=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _hide(secrets: list[str]) -> None:
    """Keep secrets out of every log record: SGLang logs all its arguments at start."""
    make_record = logging.getLogRecordFactory()

    def redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        text = record.getMessage()
        if any(secret in text for secret in secrets):
            for secret in secrets:
                text = text.replace(secret, "<redacted>")
            record.msg, record.args = text, ()
        return record

    logging.setLogRecordFactory(redacted)


def _first_line() -> bytes:
    """Read the first line of standard input, unbuffered, so that nothing after it is taken from the watch thread."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            raise SystemExit("launch.py: standard input closed before the keys arrived")
        line += piece
    return line


def main(argv: list[str]) -> None:
    """Serve until the parent goes."""
    sys.path.append(str(Path(__file__).resolve().parents[3]))
    keys: dict[str, str] = json.loads(_first_line())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if keys:
        _hide(list(keys.values()))
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    server_args = prepare_server_args(argv)
    for name, value in keys.items():
        setattr(server_args, name, value)
    run_server(server_args)


if __name__ == "__main__":  # SGLang's worker processes import this file again
    main(sys.argv[1:])
