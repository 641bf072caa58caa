"""Planned updates inside an SGLang server: its workers call :func:`load` and receive their own parts of the weights.

    sglang.launch_server ... --custom-weight-loader megatron_tropd.weights.engine_loader.load

SGLang calls a custom loader in every tensor-parallel worker with the model and the tensors of an
``update_weights_from_tensor`` request.  Here the one tensor is a request in JSON (:class:`LoaderRequest`):
``locate`` reports where the worker's weights are, ``connect`` builds the plan and joins the side group, ``receive``
receives one update while the trainer pushes it, ``close`` leaves the group.  An exception in a custom loader ends the
whole server, so every error is caught here: the outcome is written to the side group's store, where the trainer waits
for it, and only logged where the request cannot be read or that store cannot be reached.  A failed update is also
refused to the sending ranks.  This module needs torch and this package's pure modules, but not Megatron.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_tropd.parallel.roles import own_address
from megatron_tropd.parallel.side_group import Backend, join_store
from megatron_tropd.weights.plan.placement import Location, location
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.transport.connect import connect_receiver
from megatron_tropd.weights.transport.message import TransportError
from megatron_tropd.weights.transport.receiver import PlannedReceiver

log = logging.getLogger(__name__)

LOADER = f"{__name__}.load"
REQUEST = "megatron_tropd.request"
Request = Literal["locate", "connect", "receive", "close"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderRequest:
    """A request of the trainer to an engine.  ``group`` names the side group; it is new for every connection."""

    do: Request
    group: str
    engine: int
    ticket: str
    """Last part of the key of the outcome in the store; new for every request of a group."""
    version: int = -1
    spec: str = ""
    """Text of :meth:`PlanSpec.to_json`.  This and the fields below are read by ``connect``; host, port and timeout
    also by ``locate``, ``run_name`` also by ``receive`` and ``close``."""
    digest: str = ""
    host: str = ""
    port: int = 0
    backend: Backend = "gloo"
    timeout_s: float = 600.0
    run_name: str = ""
    """Name of the trainer's run.  Versions are compared within a run: another run may begin with an earlier one."""
    shared: bool = False
    """Whether payloads stay in the trainer's memory where this engine can open it."""

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return the request as the named tensors of SGLang's ``update_weights_from_tensor``."""
        return [(REQUEST, torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8))]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LoaderRequest:
        """Read what :meth:`named_tensors` made.

        Raises:
            ValueError: it is no request, or one of another version of this package.
        """
        if tensors.keys() != {REQUEST} or tensors[REQUEST].dtype != torch.uint8 or tensors[REQUEST].ndim != 1:
            given = ", ".join(f"{name} [{value.dtype}]" for name, value in tensors.items())
            raise ValueError(f"given {given or 'nothing'}; expected one row of bytes, {REQUEST}")
        try:
            value = json.loads(bytes(tensors[REQUEST].tolist()))
            request = cls(**value)
        except (TypeError, RecursionError) as error:  # json's own error is a ValueError
            raise ValueError(f"not the fields of a request: {error}") from error
        for name, kind in get_type_hints(cls).items():
            if not _fits(found := getattr(request, name), kind):
                raise ValueError(f"{name} is a {type(found).__name__}, or no such value; expected {kind}")
        return request


def _fits(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    return type(value) in ((int, float) if kind is float else (kind,))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of a request on one rank of an engine."""

    error: str = ""
    """Empty if the request succeeded."""
    version: int = -1
    """Last update that arrived whole; not set by ``locate``."""
    partial: bool = False
    """Whether the weights are a mixture, not those of one whole update."""
    payload_bytes: int = 0
    location: Location | None = None
    """Where the rank's weights are; the answer to ``locate``."""

    @classmethod
    def from_json(cls, text: str | bytes) -> Outcome:
        """Read an outcome from the text of ``json.dumps(asdict(outcome))``."""
        value = json.loads(text)
        at = value["location"]
        return cls(**{**value, "location": at and Location(**at)})


@dataclass(slots=True, kw_only=True)
class _Connection:
    store: dist.TCPStore
    receiver: PlannedReceiver


_connections: dict[str, _Connection] = {}
"""The connections of this process, by group."""
_versions: dict[tuple[str, int], int] = {}
"""Last whole update by run and engine, over all connections, so that an older one is refused after a reconnection."""


def outcome_key(group: str, engine: int, rank: int, ticket: str) -> str:
    """Return the key under which the store holds the outcome of a request."""
    return f"outcome/{group}/{engine}/{rank}/{ticket}"


def read_outcomes(store: dist.TCPStore, request: LoaderRequest, num_ranks: int, *, timeout_s: float) -> list[Outcome]:
    """Wait for the outcome of ``request`` on every rank of an engine and return them; called by the trainer.

    Raises:
        TransportError: a rank wrote no outcome in time, or the request failed there; the message names engine
            and rank.
    """
    outcomes, problems = [], []
    for rank in range(num_ranks):
        key = outcome_key(request.group, request.engine, rank, request.ticket)
        try:
            store.wait([key], timedelta(seconds=timeout_s))
        except (dist.DistError, RuntimeError) as error:
            said = f"reported no outcome of {request.do} within {timeout_s:g} s"
            raise TransportError(f"engine {request.engine} rank {rank} {said}") from error
        try:
            outcomes.append(Outcome.from_json(store.get(key)))
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            said = f"reported an outcome of {request.do} that cannot be read: {type(error).__name__}: {error}"
            raise TransportError(f"engine {request.engine} rank {rank} {said}") from error
        if outcomes[-1].error:
            problems.append(f"engine {request.engine} rank {rank}: {outcomes[-1].error}")
    if problems:
        raise TransportError("; ".join(problems))
    return outcomes


def load(model: nn.Module, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Carry out the request in ``named_tensors`` and write its outcome to the store.  SGLang's custom weight loader."""
    try:
        request = LoaderRequest.from_tensors(dict(named_tensors))
        rank = _tensor_parallel_rank()
    except Exception:  # an exception would end the server; without a request there is no store to report to
        log.exception("the planned loader was given no request that it can carry out; nothing was done")
        return
    store = None
    try:
        if request.do in ("locate", "connect"):
            store = join_store(host=request.host, port=request.port, timeout_s=request.timeout_s)
        else:
            store = _connections[request.group].store
        outcome = _serve(model, request, rank, store)
    except Exception as error:  # it would end the server
        log.exception("planned %s of engine %d rank %d failed", request.do, request.engine, rank)
        receiver = getattr(_connections.get(request.group), "receiver", None)
        outcome = Outcome(
            error=f"{type(error).__name__}: {error}", version=_versions.get((request.run_name, request.engine), -1),
            partial=bool(receiver and receiver.partial),
        )  # fmt: skip
    if store is None:
        return
    try:
        store.set(outcome_key(request.group, request.engine, rank, request.ticket), json.dumps(asdict(outcome)))
    except Exception:  # the trainer is gone, or its store is
        log.exception(
            "the outcome of planned %s of engine %d rank %d was not reported", request.do, request.engine, rank
        )


def _tensor_parallel_rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_rank


def _serve(model: nn.Module, request: LoaderRequest, rank: int, store: dist.TCPStore) -> Outcome:
    if request.do == "locate":
        return Outcome(location=location(model.parameters()))
    if request.do == "connect":
        # The last trainer may have left without ``close``.  Its connection would keep staging memory allocated, and
        # with shared memory the trainer's as well.
        _connections.clear()
        receiver = connect_receiver(
            PlanSpec.from_json(request.spec), request.digest, engine=request.engine, engine_rank=rank,
            params=dict(model.named_parameters()), store=store, group=request.group, backend=request.backend,
            timeout_s=request.timeout_s, version=_versions.get((request.run_name, request.engine), -1),
            address=own_address(request.host), shared=request.shared,
        )  # fmt: skip
        _connections[request.group] = _Connection(store=store, receiver=receiver)
        return Outcome(version=receiver.version)
    if request.do == "close":
        del _connections[request.group]
        return Outcome(version=_versions.get((request.run_name, request.engine), -1))
    report = _connections[request.group].receiver.receive(request.version)
    _versions[request.run_name, request.engine] = request.version
    return Outcome(version=request.version, payload_bytes=report.payload_bytes)
