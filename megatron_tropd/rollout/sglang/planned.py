"""Planned updates of SGLang servers: the control messages, from the rank that speaks to the servers.

The weights themselves travel from every trainer rank straight to every engine rank
(``weights/planned_transport.py``); what goes over HTTP is a request of a few hundred bytes.  Servers must
run with ``--custom-weight-loader megatron_tropd.weights.engine_loader.load``.  Each call here is made while all
trainer ranks make theirs: :meth:`PlannedEngines.connect` with ``connect_sender``,
:meth:`PlannedEngines.receive` with ``PlannedSender.push``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import uuid
from collections.abc import Sequence
from itertools import count

import torch.distributed as dist

from megatron_tropd.rollout.engine import EngineError
from megatron_tropd.rollout.sglang.engine import Engine
from megatron_tropd.weights.engine_loader import LOADER, LoaderRequest, Request, read_outcomes
from megatron_tropd.weights.message import TransportError
from megatron_tropd.weights.plan_spec import PlanSpec
from megatron_tropd.weights.side_group import LOOPBACK, Backend

_ANSWER_TIMEOUT_S = 30.0
"""Of an outcome that should be there already: the server answers after its workers are done."""


def loader_body(request: LoaderRequest, num_ranks: int) -> bytes:
    """JSON of /update_weights_from_tensor that hands ``request`` to every worker.

    The prefix cache is flushed with an update.  The weight version is not set: SGLang would set it whatever
    a custom loader meets.
    """
    message = base64.b64encode(pickle.dumps(request.named_tensors())).decode()
    body = {
        "load_format": LOADER, "serialized_named_tensors": [message] * num_ranks,
        "flush_cache": request.do == "receive", "weight_version": None,
    }  # fmt: skip
    return json.dumps(body).encode()


class PlannedEngines:
    """The engines of a plan, number by number, over one side group."""

    def __init__(
        self, engines: Sequence[Engine], spec: PlanSpec, store: dist.TCPStore, *, host: str = LOOPBACK,
        backend: Backend = "gloo", timeout_s: float, shared: bool = False, run_name: str = "", address: str = LOOPBACK,
    ) -> None:  # fmt: skip
        if len(engines) != len(spec.engines):
            raise ValueError(f"{len(engines)} engines were given for a plan of {len(spec.engines)}")
        self._engines, self._spec, self._store = engines, spec, store
        self._host, self._backend, self._timeout_s, self._shared = host, backend, timeout_s, shared
        self._run_name, self._address = run_name, address
        self._digest = spec.build().digest
        self._tickets = count()
        self.group = f"weights-{uuid.uuid4().hex}"
        """Name of the side group; tell the trainer's ranks."""

    async def connect(self) -> None:
        """Have every worker make the plan and join the group; inside an update session of every engine.

        Raises:
            EngineError: naming engine and rank.
        """
        await self._ask("connect")

    async def receive(self, version: int) -> None:
        """Have every worker take the update that the trainer pushes, and give the engines its version.

        Raises:
            EngineError: some rank did not take it whole; no engine was told the version.
        """
        await self._ask("receive", version)
        await asyncio.gather(*(engine.set_version(version) for engine in self._engines))

    async def close(self) -> None:
        """Have every worker leave the group.

        Raises:
            EngineError: naming engine and rank.
        """
        await self._ask("close")

    async def _ask(self, do: Request, version: int = -1) -> None:
        ticket = str(next(self._tickets))
        spec = self._spec.to_json() if do == "connect" else ""
        requests = [
            LoaderRequest(
                do=do, group=self.group, engine=number, ticket=ticket, version=version, spec=spec, digest=self._digest,
                host=self._host, port=self._store.port, backend=self._backend, timeout_s=self._timeout_s,
                shared=self._shared, run_name=self._run_name, address=self._address,
            )
            for number in range(len(self._engines))
        ]  # fmt: skip
        asked = zip(self._engines, requests, strict=True)
        results = await asyncio.gather(*(self._ask_one(*pair) for pair in asked), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, EngineError | TransportError):
                raise result
        if problems := [str(result) for result in results if isinstance(result, BaseException)]:
            raise EngineError(f"planned update ({do}): " + "; ".join(problems))

    async def _ask_one(self, engine: Engine, request: LoaderRequest) -> None:
        body = loader_body(request, engine.tp_size)
        # A worker may wait as long as the group allows for each of its messages; the request must outlive that.
        await engine.call_loader(body, what=f"planned {request.do}", timeout_s=2 * self._timeout_s)
        await asyncio.to_thread(
            read_outcomes, self._store, request, engine.tp_size, timeout_s=_ANSWER_TIMEOUT_S
        )  # fmt: skip
