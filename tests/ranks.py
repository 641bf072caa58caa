"""Real torch.distributed ranks for tests, started once per world size and reused.

They begin with Megatron imported (tests/warm.py), and every test that needs n ranks shares the same n processes:

    def _body(tp, value):            # module level, so that it can be pickled
        ...
        return result

    def test_it(ranks):
        assert ranks(4).run(_body, 2, value) == [...]     # one result per rank
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.warm import CONTEXT

_PORTS = itertools.count()
CALL_TIMEOUT_S = float(os.environ.get("TEST_CALL_TIMEOUT_S", "240"))


def free_port() -> int:
    """A TCP port nobody listens on, for a process that will do so later.

    The system gives ports from 32768 on to whoever asks for any, and may give a free one to another process at any
    moment.  So this one is below, and each worker of xdist has a part of them for itself.
    """
    first = 10000 + 5000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 4)
    for _ in range(5000):
        port = first + (os.getpid() + next(_PORTS)) % 5000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no TCP port is free")


def serve(rank: int, world_size: int, port: int, pipe: Connection, *, teacher_ranks: int = 0) -> None:
    """Be a rank.  The last ``teacher_ranks`` are a world of their own, as in a job with a dedicated teacher."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # prints the stacks; sent to ranks that do not answer
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    from megatron_tropd.parallel import platform

    platform.install()
    import torch
    import torch.distributed as dist

    from megatron_tropd.parallel.groups import init_distributed
    from megatron_tropd.parallel.roles import job_of_environment, split

    torch.set_num_threads(1)
    roles = split(world_size, [("teacher", teacher_ranks)] if teacher_ranks else [])
    init_distributed(CALL_TIMEOUT_S / 2, job_of_environment(roles))
    answer_calls(pipe, after=_release_groups)
    dist.destroy_process_group()


def _release_groups() -> None:
    """Each gloo group keeps a thread that wakes a hundred times a second; dozens of them, on idle ranks, would
    take the cores away from the tests of other world sizes."""
    if groups := sys.modules.get("megatron_tropd.parallel.groups"):
        groups.release_groups()


def answer_calls(pipe: Connection, after: Callable[[], None] = lambda: None) -> None:
    """Run what arrives until nothing more does, and ``after`` when a call was answered."""
    while (call := _next_call(pipe)) is not None:
        function, args, kwargs = call
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        after()


def _next_call(pipe: Connection) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    try:
        return pipe.recv()
    except EOFError:  # pytest itself was killed
        os._exit(1)


class RankPool:
    """``world_size`` living processes in one gloo group."""

    def __init__(self, world_size: int, serve: Callable[[int, int, int, Connection], None] = serve) -> None:
        port = free_port()
        self.world_size = world_size
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=serve, args=(rank, world_size, port, theirs), daemon=False)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Call ``function`` on every rank; the results in rank order, or an error with the tracebacks."""
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < self.world_size:
            open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(open_pipes, timeout=CALL_TIMEOUT_S)
            if not ready:
                for rank in set(range(self.world_size)) - set(answers):
                    os.kill(self._processes[rank].pid or 0, signal.SIGUSR1)
                time.sleep(1)
                self.kill()
                raise TimeoutError(f"ranks {sorted(set(range(self.world_size)) - set(answers))} did not answer")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    answers[rank] = (False, f"rank {rank} died")
        failures = [f"--- rank {rank}\n{text}" for rank, (good, text) in sorted(answers.items()) if not good]
        if failures:
            self.kill()  # a failed rank may have left a collective half done
            raise AssertionError("\n".join(failures))
        return [answers[rank][1] for rank in range(self.world_size)]

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()  # until then the pool still counts as alive

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                try:
                    pipe.send(None)
                except OSError:
                    process.kill()
        for process in self._processes:
            process.join(20)
            if process.is_alive():
                print(f"killing test rank {process.pid}", file=sys.stderr)
                process.kill()


class RankPools:
    """``ranks(4)`` gives the pool of four, made at the first call and again after a failure."""

    def __init__(self) -> None:
        self._pools: dict[int, RankPool] = {}

    def __call__(self, world_size: int) -> RankPool:
        pool = self._pools.get(world_size)
        if pool is None or not pool.alive:
            pool = self._pools[world_size] = RankPool(world_size)
        return pool

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
