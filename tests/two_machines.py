"""Two network namespaces as two machines: each has its own addresses, ports and loopback, and they see each other over
one virtual cable only.  Needs root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.torchrun_jobs import ROOT, environment

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PORT = 29400


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


def unavailable() -> str:
    """Why two machines cannot be made here; empty if they can."""
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    probe = f"tropd-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "delete", probe)
    except subprocess.CalledProcessError as error:
        return f"network namespaces cannot be made here: {error.stderr.strip()}"
    return ""


@dataclass(frozen=True)
class Machine:
    namespace: str
    interface: str
    address: str
    number: int

    def start(self, argv: Sequence[str], ranks: int, output: Path, **env: str) -> subprocess.Popen[str]:
        """One node of a torchrun job of two."""
        words = [
            "ip", "netns", "exec", self.namespace, sys.executable, "-W", "ignore", "-m", "torch.distributed.run",
            "--nnodes", "2", "--node-rank", str(self.number), "--nproc-per-node", str(ranks),
            "--master-addr", ADDRESSES[0], "--master-port", str(PORT), "-m", "megatron_tropd.train", *argv,
        ]  # fmt: skip
        with output.open("w") as file:
            return subprocess.Popen(
                words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, text=True,
                env=environment(GLOO_SOCKET_IFNAME=self.interface, **env),
            )  # fmt: skip


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """Make them, and take them away with everything that runs in them."""
    names = [f"tropd-{os.getpid()}-{number}" for number in range(2)]
    cables = [f"tropd{os.getpid() % 100000}{end}" for end in "ab"]
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            _ip("link", "set", cable, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield tuple(Machine(*parts, number) for number, parts in enumerate(zip(names, cables, ADDRESSES, strict=True)))
    finally:
        for name in names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for pid in pids.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
