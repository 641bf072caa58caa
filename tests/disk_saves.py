"""Saves of two ranks whose disk fails, on ranks of a :class:`tests.failing_disk.FailingDisk`."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.failing_disk import failing, rule
from tests.ranks import RankPools


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A failure of a save."""

    files: str
    calls: str
    number: int
    rank: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a save ended on one rank."""

    error: str
    failures: int
    seconds: float
    intact: bool
    """Whether the former checkpoint and the tracker are what they were."""
    left: list[str]


def _state(save_dir: Path) -> dict[str, str]:
    files = [*(save_dir / "iter_0000001").rglob("*"), save_dir / "latest_checkpointed_iteration.txt"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}


def _assembled(argv: list[str]) -> Any:
    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble
    from megatron_tropd.setup.run_spec import make_run_spec

    return assemble(make_run_spec(parse(argv), int(os.environ["WORLD_SIZE"])))


def failing_saves(argv: list[str], cases: list[Case]) -> list[Ended]:
    """On this rank: save step 1, then try to save step 2 once for each case, and at last save it."""
    import torch.distributed as dist

    from megatron_tropd.checkpoints.directory import latest_iteration
    from megatron_tropd.setup.assemble import close

    assembled, ended = _assembled(argv), []
    run = assembled.run
    save_dir = Path(run.config.save_dir)

    def save(step: int) -> str:
        try:
            run.checkpoints.save(step, run.student, run.source, None, wait=True)
            run.checkpoints.finish()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    try:
        assert not save(1)
        before = _state(save_dir)
        for case in cases:
            began = time.monotonic()
            with failing(rule(case.files, case.calls, case.number, rank=case.rank)) as failures:
                error = save(2)
                failed = failures()
            dist.barrier()
            left = sorted(path.name for path in save_dir.iterdir() if ".tmp" in path.name)
            ended.append(
                Ended(
                    error=error, failures=failed, seconds=time.monotonic() - began, intact=_state(save_dir) == before,
                    left=left,
                )
            )  # fmt: skip
            if dist.get_rank() == 0:  # it has its name before the tracker is written
                shutil.rmtree(save_dir / "iter_0000002", ignore_errors=True)
            dist.barrier()
        assert not save(2) and latest_iteration(save_dir) == 2
    finally:
        close(assembled)
    return ended


@cache
def _pools() -> RankPools:
    pools = RankPools()
    atexit.register(pools.close)
    return pools


def on_two_ranks(function: Any, *args: Any) -> list[Any]:
    """In a FailingDisk: what two ranks return, which have the library too."""
    return _pools()(2).run(function, *args)


def curve(argv: list[str], stop_after: int | None = None, *rules: str) -> tuple[list[tuple[float, float]], str, str]:
    """On this rank: (loss, gradient norm) of every step, the error that ended the run, and what was printed."""
    import contextlib
    import io

    from tests.tiny_run import reports_here

    printed = io.StringIO()
    with failing(*rules), contextlib.redirect_stdout(printed):
        try:
            reports = reports_here(argv, stop_after)
        except ValueError as error:
            return [], f"{type(error).__name__}: {error}", printed.getvalue()
    return [(report.loss, report.grad_norm) for report in reports], "", printed.getvalue()
