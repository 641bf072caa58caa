"""Planned push of a pool's weights: every trainer rank sends its rows directly to the engine ranks that hold them.

The connection of one plan lives until an engine is started anew or given up; the next push then makes another: it asks
the engines where their weights are, plans, proves the plan and has all ranks join.  When anything fails, on either
side, nothing is served and the pool sends whole tensors through SGLang's own update API instead, to whichever engines
then lack the version.  After two failures in a row it does so for the rest of the run.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.fail_together import from_all_ranks, on_all_ranks, on_rank_zero
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.side_group import LOOPBACK, host_store, join_store
from megatron_tropd.rollout.sglang.engine import Engine
from megatron_tropd.rollout.sglang.fleet import Fleet
from megatron_tropd.rollout.sglang.planned.control import PlannedEngines
from megatron_tropd.sglang.settings import SGLangSettings
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
from megatron_tropd.weights.plan.placement import Location, location, number_placements, ranks_on_one_gpu
from megatron_tropd.weights.plan.proof import prove
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.transport.connect import connect_sender
from megatron_tropd.weights.transport.message import TransportError
from megatron_tropd.weights.transport.sender import PlannedSender

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 120.0
MAX_FAILURES = 2
"""In a row; a failure may cost a whole --sglang-request-timeout, so it is not tried for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerWeights:
    """The trainer's side of a plan, on each of its ranks."""

    layout: ParallelLayout
    params: Callable[[], Mapping[str, Tensor]]
    """This rank's live parameters, by GPTModel name."""
    store_host: str = LOOPBACK
    """Address of rank 0, by which all trainer and engine ranks find each other."""
    address: str = LOOPBACK
    """This rank's own; the servers started by rank 0 share its address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Invitation:
    """What a rank needs to join the side group that rank 0 hosts."""

    spec: PlanSpec
    port: int
    group: str


class PlannedPush:
    """Collective over the trainer's ranks; ``fleet`` and ``run`` (of its event loop) are rank 0's."""

    def __init__(
        self, settings: SGLangSettings, arch: Architecture, weights: TrainerWeights, *, shared: bool = False
    ) -> None:
        self._settings, self._arch, self._weights, self._shared = settings, arch, weights, shared
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._store: dist.TCPStore | None = None
        self._sender: PlannedSender | None = None
        self._engines: PlannedEngines | None = None
        self._connected_to: tuple[tuple[int, int], ...] = ()
        self._run_name = uuid.uuid4().hex
        self._locations: list[Location] = []
        self._failures = 0

    @property
    def given_up(self) -> bool:
        """Whether planned pushes failed too often to be tried again in this run; the same on every rank."""
        return self._failures >= MAX_FAILURES

    def deliver(self, fleet: Fleet | None, run: Callable[[Any], Any], version: int) -> bool:
        """Carry out one planned update; returns whether every server that is not given up now serves ``version``.

        Raises:
            EngineError: on every rank alike: no server is left.
        """
        if not self._locations:
            self._locations = from_all_ranks(lambda: location(self._weights.params().values()), EngineError)
        begun = on_rank_zero(lambda: self._begin(fleet, run), EngineError)
        try:
            on_all_ranks(lambda: self._carry_out(fleet, run, version, connect=not begun), TransportError)
        except TransportError as error:
            self._failed(fleet, version, str(error))
            return False
        self._failures = 0
        names = list(hf_shapes(self._arch))
        return bool(on_rank_zero(lambda: run(fleet.end_update(version, names, None)) if fleet else None, EngineError))

    def _failed(self, fleet: Fleet | None, version: int, problem: str) -> None:
        self._failures += 1
        self._drop()
        if fleet is not None:
            fleet.counts["planned_failed"] += 1
            log.warning("planned update to version %d failed, sending whole tensors: %s", version, problem)
            if self.given_up:
                log.error("planned updates failed %d times in a row and are given up for this run", MAX_FAILURES)

    def _begin(self, fleet: Fleet | None, run: Callable[[Any], Any]) -> bool:
        """Open sessions; returns whether the servers are those of the present connection."""
        assert fleet is not None
        run(fleet.begin_update())
        return self._sender is not None and _identities(_updating(fleet)) == self._connected_to

    def _invite(self, fleet: Fleet | None, run: Callable[[Any], Any]) -> _Invitation:
        """Return a plan for the servers that have opened a session, and the address and name of the side group."""
        assert fleet is not None
        self._drop()
        engines = _updating(fleet)
        self._store = self._store or host_store(host=self._weights.store_host, timeout_s=CONNECT_TIMEOUT_S)
        self._engines = PlannedEngines(
            engines, self._store, host=self._weights.store_host, backend=self._backend,
            timeout_s=self._settings.request_timeout_s, shared=self._shared, run_name=self._run_name,
        )  # fmt: skip
        self._connected_to = _identities(engines)
        spec = self._proved_spec(engines, run(self._engines.locate()))
        return _Invitation(spec=spec, port=self._store.port, group=self._engines.group)

    def _proved_spec(self, engines: list[Engine], at: list[list[Location]]) -> PlanSpec:
        """Return the specification of a proved plan for engines whose ranks are ``at``; proof.py checks the plan.

        Raises:
            TransportError: NCCL would have to send between ranks on one GPU.
            ProofError, PlanError: there is no such plan.
        """
        if self._backend == "nccl" and not self._shared and (pair := ranks_on_one_gpu(self._locations, at)):
            raise TransportError(
                f"{pair} are on one GPU, where NCCL cannot send from one to the other; pass "
                "--update-weight-transport planned-shared"
            )
        source_placements, engine_placements = number_placements(self._locations, at)
        spec = PlanSpec(
            arch=self._arch, layout=self._weights.layout, dtype=self._settings.dtype,
            engines=tuple(EngineLayout(tp=e.tp_size, ep=e.ep_size, cpu=e.is_cpu) for e in engines),
            bucket_bytes=self._settings.bucket_bytes,
            source_placements=source_placements, engine_placements=engine_placements,
        )  # fmt: skip
        proof = prove(spec.build(), spec.arch, spec.layout)
        log.info("planned the weights of %d engines: %d bytes; the plan is proved", len(engines), proof.bytes_sent)
        return spec

    @property
    def _backend(self) -> Any:
        return "nccl" if self._settings.cuda else "gloo"

    def _carry_out(self, fleet: Fleet | None, run: Callable[[Any], Any], version: int, *, connect: bool) -> None:
        """Do this rank's part: connect if asked to, then send."""
        if connect:
            invitation = on_rank_zero(lambda: self._invite(fleet, run), TransportError)
            self._together(run, lambda engines: engines.connect(invitation.spec), lambda: self._join(invitation))
        sender = self._sender
        assert sender is not None
        self._together(run, lambda engines: engines.receive(version), lambda: sender.push(version))

    def _join(self, invitation: _Invitation) -> None:
        host = self._weights.store_host
        store = self._store or join_store(host=host, port=invitation.port, timeout_s=CONNECT_TIMEOUT_S)
        self._sender = connect_sender(
            invitation.spec, rank=self._rank, params=self._weights.params(), store=store,
            group=invitation.group, backend=self._backend, timeout_s=self._settings.request_timeout_s,
            address=self._weights.address, shared=self._shared,
        )  # fmt: skip

    def _together(
        self, run: Callable[[Any], Any], control: Callable[[PlannedEngines], Any], own: Callable[[], Any]
    ) -> None:
        """Do this rank's part; rank 0 sends the servers their requests at the same time."""
        engines = self._engines
        if engines is None:
            own()
            return

        async def both() -> Sequence[Any]:
            return await asyncio.gather(control(engines), asyncio.to_thread(own), return_exceptions=True)

        for outcome in run(both()):
            if isinstance(outcome, BaseException):
                raise outcome

    def _drop(self) -> None:
        """Drop the connection; the servers drop theirs when they are restarted or asked to connect."""
        self._sender, self._engines, self._connected_to = None, None, ()


def _updating(fleet: Fleet) -> list[Engine]:
    return [engine for engine in fleet.engines if engine.updating]


def _identities(engines: list[Engine]) -> tuple[tuple[int, int], ...]:
    """Identities of the running servers; a restarted server has a new one."""
    return tuple((engine.index, engine.starts) for engine in engines)
