"""Servers on the other machines of a job: a keeper on each starts, watches and ends them, as rank 0 asks.

The keeper is a thread of the machine's first local rank.  Requests reach it through a mailbox of the job's store;
what it knows of a server is one value in the store, which it renews when it changes:

    rank 0:  RemoteServer.start() --- mailbox of the node ---> Keeper: ServerProcess.start()
             RemoteServer.url, is_running() <--- store ------- Keeper: state of the process
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.parallel.mailbox import Mailbox, Message
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import ServerSettings

Connect = Callable[[], dist.Store]
"""Makes a connection to the job's store that one thread or object has for itself."""

_LOOK_S = 0.2
"""Time between two looks of a keeper at its processes."""
_START_S = 60.0
"""Time within which a keeper must have started a process (not: until the server answers)."""


def _mailbox(node: int) -> str:
    return f"sglang-keeper/{node}"


def _state_key(index: int) -> str:
    return f"sglang-server/{index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What a keeper tells of a process."""

    starts: int = 0
    """Number of the start request that this is about."""
    url: str = ""
    log: str = ""
    pid: int | None = None
    running: bool = False
    exit_status: int | None = None
    log_tail: str = ""
    problem: str = ""
    """Why it could not be started; empty if it was."""


class Keeper:
    """Starts and ends the servers of one machine in a thread of its own.

    Args:
        node: number of the machine in the job.
        settings: of this machine's servers: their address is this machine's.
        max_positions: of the model.
        connect: see :data:`Connect`.
    """

    def __init__(self, node: int, settings: ServerSettings, max_positions: int, connect: Connect) -> None:
        self._settings, self._max_positions = settings, max_positions
        self._mailbox, self._store = Mailbox(_mailbox(node), connect), connect()
        self._servers: dict[int, ServerProcess] = {}
        self._starts: dict[int, int] = {}
        self._told: dict[int, _State] = {}
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="sglang-keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all its servers.  May be called twice."""
        self._ends.set()
        self._thread.join(_START_S)
        for server in self._servers.values():
            server.stop()

    def _keep(self) -> None:
        while not self._ends.is_set():
            message = self._mailbox.take(_LOOK_S)
            if message is not None:
                self._obey(message)
            for index, server in self._servers.items():
                self._tell(index, self._look(index, server))

    def _obey(self, message: Message) -> None:
        index = int(message.values["index"])
        if index not in self._servers:
            self._servers[index] = ServerProcess(self._settings, index, self._max_positions)
        server = self._servers[index]
        self._starts[index] = int(message.values["starts"])
        if message.kind == "stop":
            server.stop()
            return
        try:
            server.start()
        except OSError as error:
            self._tell(index, _State(starts=self._starts[index], problem=str(error)))

    def _look(self, index: int, server: ServerProcess) -> _State:
        told = self._told.get(index)
        if told and told.problem and told.starts == self._starts[index]:
            return told
        running = server.is_running()
        return _State(
            starts=self._starts[index], url=server.url, log=str(server.log), pid=server.pid, running=running,
            exit_status=server.exit_status(), log_tail="" if running else server.log_tail(),
        )  # fmt: skip

    def _tell(self, index: int, state: _State) -> None:
        if state != self._told.get(index):
            self._store.set(_state_key(index), json.dumps(asdict(state)))
            self._told[index] = state


class RemoteServer:
    """Implements ServerHandle for a server that a keeper on another machine starts.

    Args:
        node: number of that machine.
        index: of the server.
        connect: see :data:`Connect`.
    """

    def __init__(self, node: int, index: int, connect: Connect) -> None:
        self._node, self._index = node, index
        self._mailbox, self._store, self._lock = Mailbox(_mailbox(node), connect), connect(), threading.Lock()
        self._starts = 0
        self.url, self.log, self.is_local = "", Path(), False

    def _state(self) -> _State:
        with self._lock:
            if not self._store.check([_state_key(self._index)]):
                return _State()
            return _State(**json.loads(self._store.get(_state_key(self._index))))

    def _ask(self, kind: str) -> None:
        self._mailbox.post(Message(kind=kind, values={"index": self._index, "starts": self._starts}))

    def start(self) -> None:
        """See ServerHandle."""
        self._starts += 1
        self._ask("start")
        deadline = time.monotonic() + _START_S
        while (state := self._state()).starts != self._starts:
            if time.monotonic() > deadline:
                raise OSError(f"node {self._node} did not start SGLang server {self._index} within {_START_S:g} s")
            time.sleep(_LOOK_S / 4)
        if state.problem:
            raise OSError(f"node {self._node} cannot start SGLang server {self._index}: {state.problem}")
        self.url, self.log = state.url, Path(state.log)

    @property
    def pid(self) -> int | None:
        """See ServerHandle."""
        return self._state().pid

    def is_running(self) -> bool:
        """See ServerHandle."""
        return self._state().running

    def exit_status(self) -> int | None:
        """See ServerHandle."""
        return self._state().exit_status

    def log_tail(self) -> str:
        """See ServerHandle."""
        return f"(on node {self._node}) {self._state().log_tail}"

    def stop(self) -> None:
        """See ServerHandle; does not wait."""
        self._ask("stop")
