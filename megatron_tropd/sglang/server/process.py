"""One server process: started, watched, and ended, with all its children, when this process ends."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from megatron_tropd.sglang.server.command import meeting_environment, server_command, server_environment
from megatron_tropd.sglang.settings import ServerSettings

_TAIL_BYTES = 4000
_STOP_TIMEOUT_S = 30.0


_PORTS = range(30100, 32768)
"""Below those that Linux gives to connections (from 32768 on): a server listens a minute after its port was chosen."""
_ATTEMPTS = 100


def free_port(host: str) -> int:
    """A port that no process listens on now, and that the system gives to nobody who asks for any."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in [*(secrets.choice(_PORTS) for _ in range(_ATTEMPTS)), 0]:  # at last any
        with socket.socket(family, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise OSError(f"no port of {host} is free")


class ServerProcess:
    """Server number ``index`` of this run; may be started again after it died.

    The process leads a group of its own, which is killed as a whole.  Its standard input is a pipe that
    only this process holds open: the launcher ends the group when it closes, however this process ended.
    """

    def __init__(self, settings: ServerSettings, index: int, max_positions: int) -> None:
        self._settings, self._index, self._max_positions = settings, index, max_positions
        self._process: subprocess.Popen[bytes] | None = None
        self._starts = 0
        self._meeting: Path | None = None
        self.url = ""
        self.log = Path()
        self.is_local = True

    def start(self) -> None:
        """Start on a new port; returns at once, long before the server answers.

        Raises:
            OSError: the interpreter or the log directory cannot be used.
        """
        self.stop()
        settings = self._settings
        port = free_port(settings.host)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self._starts += 1
        self.url = f"http://{host}:{port}"
        settings.log_dir.mkdir(parents=True, exist_ok=True)
        self.log = settings.log_dir / f"sglang-{self._index}-start-{self._starts}.log"
        descriptor, name = tempfile.mkstemp(prefix="tropd-sglang-")  # on a local disk: its processes lock it
        os.close(descriptor)
        self._meeting = Path(name)
        environment = meeting_environment(settings, port, self._meeting)
        environment |= server_environment(settings, self._index, os.environ)
        with open(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as log:
            self._process = subprocess.Popen(
                server_command(settings, self._index, port, self._max_positions),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        keys = settings.keys
        message = {"api_key": keys.api, "admin_api_key": keys.admin} if keys else {}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # died at once: the health check says so
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def pid(self) -> int | None:
        """Process id of the group's leader; None before the first start."""
        return None if self._process is None else self._process.pid

    def exit_status(self) -> int | None:
        """Exit status; None while the process runs."""
        return None if self._process is None else self._process.poll()

    def is_running(self) -> bool:
        """Whether the process exists; it may not answer yet."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self) -> str:
        """The last lines of its log, for error messages."""
        try:
            data = self.log.read_bytes()[-_TAIL_BYTES:]
        except OSError:
            return "(no log)"
        return data.decode(errors="replace").strip() or "(empty log)"

    def stop(self) -> None:
        """Kill the group and wait for its leader.  May be called twice."""
        process, self._process = self._process, None
        if self._meeting is not None:
            self._meeting.unlink(missing_ok=True)
        if process is None:
            return
        # SIGKILL, because SGLang's orderly end waits for requests; nothing of the server is worth keeping.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_TIMEOUT_S)
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
