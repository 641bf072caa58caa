"""Real torchrun jobs of the training command."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent


def command(argv: list[str], nproc: int = 2) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(nproc),
            "--standalone", "-m", "megatron_tropd.train", *argv]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def wait_for_steps(metrics: Path, count: int, job, timeout: float = 150.0) -> int:
    """Until ``metrics`` has ``count`` lines of steps."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and job.poll() is None:
        if metrics.is_file() and (found := metrics.read_text().count('"learning_rate"')) >= count:
            return found
        time.sleep(0.05)
    raise AssertionError(f"the job did not reach step {count} (exit code {job.poll()})")


def process(launcher: int, word: str) -> int:
    """A process under ``launcher`` whose command line holds ``word``."""
    children = psutil.Process(launcher).children(recursive=True)
    return next(p.pid for p in children if any(word in argument for argument in p.cmdline()))
