"""The real sglang-router before real servers, where SGLang's environment has it."""

from __future__ import annotations

import contextlib
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ranks import free_port
from tests.sglang_helpers import NO_SGLANG, PYTHON

START_S = 120.0
PORT_TAKEN = "Address already in use"


def _unavailable() -> str:
    """Why there is no router here; empty if there is one."""
    if not PYTHON.exists():
        return NO_SGLANG
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang_router') is None)"
    done = subprocess.run([PYTHON, "-c", look], timeout=60, check=False)
    return "" if done.returncode == 0 else "SGLang's environment has no sglang-router (requirements/sglang-cpu.txt)"


_REASON = _unavailable()
needs_router = pytest.mark.skipif(bool(_REASON), reason=_REASON)


@dataclass(frozen=True)
class Router:
    url: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it as a crash does."""
        self.process.kill()
        self.process.wait(30)

    def answers(self, key: str = "") -> bool:
        """Whether it has a server behind it."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            request = urllib.request.Request(f"{self.url}/get_model_info", headers=headers)
            return bool(urllib.request.urlopen(request, timeout=5).status == 200)
        except (OSError, urllib.error.HTTPError):
            return False


@contextlib.contextmanager
def routing(urls: Sequence[str], log: Path, *, key: str = "") -> Iterator[Router]:
    """A router before the servers at ``urls``, which have the API key ``key``."""
    router = _started(urls, log, key)
    try:
        yield router
    finally:
        router.kill()


def _started(urls: Sequence[str], log: Path, key: str) -> Router:
    """It is given its ports, so another process may have taken one before it listens; then others are tried."""
    deadline = time.monotonic() + START_S
    while True:
        router = Router(*_launched(urls, log, key))
        while router.process.poll() is None and time.monotonic() < deadline:
            if router.answers(key):
                return router
            time.sleep(0.1)
        router.kill()
        said = log.read_text()
        assert PORT_TAKEN in said and time.monotonic() < deadline, said


def _launched(urls: Sequence[str], log: Path, key: str) -> tuple[str, subprocess.Popen[bytes]]:
    """Its URL and its process."""
    port = free_port()
    words = [
        PYTHON, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--policy", "round_robin",
        "--log-level", "warn", "--worker-startup-check-interval", "1", "--worker-urls", *urls,
        *(("--api-key", key) if key else ()),
    ]  # fmt: skip
    with log.open("wb") as output:
        return f"http://127.0.0.1:{port}", subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
