"""Real torchrun jobs, of the training command or of another module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.waiting import wait_for
from tests.warm import WarmJob

ROOT = Path(__file__).resolve().parent.parent
DELAY = ROOT / "tests" / "delay"


def command(argv: list[str], *, module: str = "megatron_tropd.train") -> list[str]:
    """For ``subprocess``: a job of two ranks, whose processes import everything themselves."""
    return [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
            "-m", module, *argv]  # fmt: skip


def start(
    argv: list[str], cwd: Path, env: dict[str, str] | None = None, module: str = "megatron_tropd.train", *,
    launcher: Sequence[str] = ("--standalone",), ranks: int = 2,
) -> WarmJob:  # fmt: skip
    """A job whose ranks are forked from a process that has imported everything."""
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    words = ["--start-method", "fork", "--nproc-per-node", str(ranks), *launcher, "--run-path", str(file), *argv]
    return WarmJob(words, cwd=cwd, env=env or environment())


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def delaying(rank: int) -> dict[str, str]:
    """The environment of a job whose local rank ``rank`` stands at Python's start until torchrun ends it."""
    return environment(PYTHONPATH=f"{DELAY}:{ROOT}", DELAYED_RANK=str(rank))


def output_of(
    argv: list[str], cwd: Path, env: dict[str, str] | None = None, module: str = "megatron_tropd.train", *,
    ranks: int = 2,
) -> str:  # fmt: skip
    """Everything that a job prints, and a last line with torchrun's exit code."""
    with start(argv, cwd, env, module, ranks=ranks) as job:
        status = job.wait(timeout=400)
    return f"{job.output}\ntorchrun exited with {status}"


def output_from_imports_on(
    argv: list[str], cwd: Path, env: dict[str, str] | None = None, module: str = "megatron_tropd.train"
) -> str:
    """As :func:`output_of`, of a job whose processes import everything themselves.  Only of such ranks does torchrun's
    summary name all that failed."""
    done = subprocess.run(
        command(argv, module=module), cwd=cwd, env=env or environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
    )  # fmt: skip
    return f"{done.stdout}\ntorchrun exited with {done.returncode}"


def output_with_delay(delayed: int | None, argv: list[str], cwd: Path, module: str = "megatron_tropd.train") -> str:
    """As :func:`output_of`, of a job whose local rank ``delayed`` comes no further than Python's start; None: all do."""
    if delayed is None:
        return output_of(argv, cwd, module=module)
    return output_from_imports_on(argv, cwd, delaying(delayed), module)


def own_tracebacks(text: str) -> int:
    """How many tracebacks are not torchrun's own: those of its main, and of what it says of a forked rank."""
    torchruns = ("errors.ChildFailedError: ", "multiprocessing.api.SignalException: ", "spawn.ProcessExitedException: ")
    return text.count("Traceback (most recent call last)") - sum(map(text.count, torchruns))


def wait_for_steps(metrics: Path, count: int, job, timeout: float = 150.0) -> int:
    """Until ``metrics`` has ``count`` lines of steps."""

    def steps() -> int:
        return metrics.read_text().count('"learning_rate"') if metrics.is_file() else 0

    wait_for(lambda: steps() >= count, job, timeout)
    return steps()


def process(launcher: int, word: str) -> int:
    """A process under ``launcher`` whose command line holds ``word``."""
    children = psutil.Process(launcher).children(recursive=True)
    return next(p.pid for p in children if any(word in argument for argument in command_of(p)))


def command_of(process: psutil.Process) -> list[str]:
    """The words of its command line; [] of a zombie, and if it ended since it was listed."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
