"""Control messages of planned weight updates, sent by the rank that talks to the SGLang servers.

The weights themselves travel from every trainer rank straight to every engine rank
(``weights/transport/sender.py``); only a small request goes over HTTP.  Servers must
run with ``--custom-weight-loader megatron_tropd.weights.engine_loader.load``.  Each call here is made while all
trainer ranks make theirs: :meth:`PlannedEngines.connect` with ``connect_sender``,
:meth:`PlannedEngines.receive` with ``PlannedSender.push``; ``locate`` and ``close`` need no trainer rank.
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

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.side_group import LOOPBACK, Backend
from megatron_tropd.rollout.sglang.engine import Engine
from megatron_tropd.weights.engine_loader import LOADER, LoaderRequest, Outcome, Request, read_outcomes
from megatron_tropd.weights.plan.placement import Location
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.transport.message import TransportError

_ANSWER_TIMEOUT_S = 30.0
"""Of an outcome that should be there already: the server answers after its workers are done."""


def loader_body(request: LoaderRequest, num_ranks: int) -> bytes:
    """Return the JSON of /update_weights_from_tensor that gives ``request`` to every worker.

    The prefix cache is flushed with an update.  The weight version is not set: SGLang would set it even
    if a custom loader failed.
    """
    message = base64.b64encode(pickle.dumps(request.named_tensors())).decode()
    body = {
        "load_format": LOADER, "serialized_named_tensors": [message] * num_ranks,
        "flush_cache": request.do == "receive", "weight_version": None,
    }  # fmt: skip
    return json.dumps(body).encode()


class PlannedEngines:
    """The engines of a plan, in the order of their numbers, over one side group."""

    def __init__(
        self, engines: Sequence[Engine], store: dist.TCPStore, *, host: str = LOOPBACK,
        backend: Backend = "gloo", timeout_s: float, shared: bool = False, run_name: str = "",
    ) -> None:  # fmt: skip
        self._engines, self._store = engines, store
        self._host, self._backend, self._timeout_s, self._shared = host, backend, timeout_s, shared
        self._run_name = run_name
        self._tickets = count()
        self.group = f"weights-{uuid.uuid4().hex}"
        """Name of the side group; tell the trainer's ranks."""

    async def locate(self) -> list[list[Location]]:
        """Where the weights of every rank of every engine are.

        Raises:
            EngineError: naming engine and rank.
        """
        return [[one.location for one in ranks if one.location] for ranks in await self._ask("locate")]

    async def connect(self, spec: PlanSpec) -> None:
        """Have every worker make the plan of ``spec`` and join the group; inside an update session of every engine.

        Raises:
            EngineError: naming engine and rank.
            ValueError: the plan is of another number of engines.
        """
        if len(self._engines) != len(spec.engines):
            raise ValueError(f"{len(self._engines)} engines were given for a plan of {len(spec.engines)}")
        await self._ask("connect", spec=spec)

    async def receive(self, version: int) -> None:
        """Have every worker take the update that the trainer pushes, and give the engines its version.

        Raises:
            EngineError: some rank did not take it whole; no engine was told the version.
        """
        await self._ask("receive", version=version)
        await asyncio.gather(*(engine.set_version(version) for engine in self._engines))

    async def close(self) -> None:
        """Have every worker leave the group.

        Raises:
            EngineError: naming engine and rank.
        """
        await self._ask("close")

    async def _ask(self, do: Request, *, version: int = -1, spec: PlanSpec | None = None) -> list[list[Outcome]]:
        """What every rank of every engine made of it."""
        ticket = str(next(self._tickets))
        text, digest = (spec.to_json(), spec.build().digest) if spec else ("", "")
        requests = [
            LoaderRequest(
                do=do, group=self.group, engine=number, ticket=ticket, version=version, spec=text, digest=digest,
                host=self._host, port=self._store.port, backend=self._backend, timeout_s=self._timeout_s,
                shared=self._shared, run_name=self._run_name,
            )
            for number in range(len(self._engines))
        ]  # fmt: skip
        asked = zip(self._engines, requests, strict=True)
        results = await asyncio.gather(*(self._ask_one(*pair) for pair in asked), return_exceptions=True)
        problems, outcomes = [], []
        for result in results:
            if isinstance(result, EngineError | TransportError):
                problems.append(str(result))
            elif isinstance(result, BaseException):
                raise result
            else:
                outcomes.append(result)
        if problems:
            raise EngineError(f"planned update ({do}): " + "; ".join(problems))
        return outcomes

    async def _ask_one(self, engine: Engine, request: LoaderRequest) -> list[Outcome]:
        body = loader_body(request, engine.tp_size)
        # A worker may wait as long as the group allows for each of its messages; the request must outlive that.
        await engine.call_loader(body, what=f"planned {request.do}", timeout_s=2 * self._timeout_s)
        return await asyncio.to_thread(
            read_outcomes, self._store, request, engine.tp_size, timeout_s=_ANSWER_TIMEOUT_S
        )  # fmt: skip
