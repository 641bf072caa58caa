"""Planned updates into real SGLang servers: the same weights as through SGLang's own update API, and as transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.parallel.side_group import host_store
from megatron_tropd.rollout.sglang.api.checksums import SentChecksums
from megatron_tropd.rollout.sglang.planned.control import PlannedEngines
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.plan.placement import location
from megatron_tropd.weights.plan.spec import PlanSpec
from tests.planned_ranks import as_torch, fill, serve
from tests.ranks import RankPool
from tests.sglang_helpers import check_rollouts, params, requests_of

TIMEOUT_S = 60.0
POISON = 0x7FC00001
_held: dict = {}  # of a trainer process


def _join(spec_json, port, group, shared):
    """Body: a trainer rank with poisoned parameters joins the group."""
    import os

    from megatron_tropd.parallel.side_group import join_store
    from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
    from megatron_tropd.weights.transport.connect import connect_sender

    spec, rank = PlanSpec.from_json(spec_json), int(os.environ["RANK"])
    boxes = rank_boxes(spec.arch, spec.layout, rank)
    poisoned = {p.names[0]: np.full(p.shape, POISON, np.uint32) for p in boxes}
    tensors = as_torch(poisoned, spec.dtype)
    store = join_store(port=port, timeout_s=TIMEOUT_S)
    sender = connect_sender(
        spec, rank=rank, params=tensors, store=store, group=group, backend="gloo", timeout_s=TIMEOUT_S,
        shared=shared,
    )  # fmt: skip
    _held.update(boxes=boxes, params=tensors, sender=sender, dtype=spec.dtype)


def _push(hf, version):
    """Body: take new weights and push them; what went wrong, if anything."""
    new = as_torch(fill(_held["boxes"], hf, POISON, _held["dtype"]), _held["dtype"])
    for param in _held["boxes"]:
        _held["params"][param.names[0]].copy_(new[param.names[-1]])
    try:
        report = _held["sender"].push(version)
        return report.payload_bytes, report.shared_bytes
    except RuntimeError as error:
        return str(error)


class Link:
    """Two trainer ranks (TP 2) and the two servers, driven from here as a trainer's first rank would."""

    def __init__(self, sglang, *, shared: bool = False) -> None:
        self.sglang = sglang
        self.spec = PlanSpec(
            arch=sglang.arch, layout=ParallelLayout(tp=2), engines=(EngineLayout(cpu=True),) * 2, dtype="float32",
            bucket_bytes=32 << 10,
        )  # fmt: skip
        self.store = host_store(timeout_s=TIMEOUT_S)
        self.trainers = RankPool(2, serve)
        self.engines = PlannedEngines(sglang.engines, self.store, timeout_s=TIMEOUT_S, shared=shared)
        self.begin()
        self._together(
            self.engines.connect(self.spec), _join, self.spec.to_json(), self.store.port, self.engines.group, shared
        )

    def begin(self) -> None:
        self.sglang.run(self.sglang.pool._fleet.begin_update())

    def _together(self, control, body, *arguments):
        with ThreadPoolExecutor(1) as thread:
            pushed = thread.submit(self.trainers.run, body, *arguments)
            try:
                self.sglang.run(control)
            finally:
                self.said = pushed.result()

    def hf(self) -> dict[str, np.ndarray]:
        state = self.sglang.student.model.state_dict()
        return {name: tensor.numpy().view(np.uint32) for name, tensor in state.items()}

    def push(self, version: int, *, asked: int | None = None) -> None:
        self._together(self.engines.receive(asked or version), _push, self.hf(), version)

    def end(self, version: int) -> None:
        """SGLang's own checksums must be those of what the student holds."""
        hashes, state = SentChecksums(), self.sglang.student.model.state_dict()
        for name, tensor in state.items():
            hashes.add(name, tensor)
        assert self.sglang.run(self.sglang.pool._fleet.end_update(version, list(state), hashes.result()))
        self.sglang.pool._version = version


@pytest.fixture(scope="module")
def link(sglang):
    link = Link(sglang)
    yield link
    link.trainers.kill()


def test_engines_say_where_their_weights_are(link):
    assert link.sglang.run(link.engines.locate()) == [[location([])]] * 2


def _error(link, version, measured, claim) -> None:
    requests = requests_of(6, samples=2, max_new=12)
    rollouts = link.sglang.pool.generate(requests, params(), version)
    worst = check_rollouts(rollouts, requests, link.sglang.student.model, version)
    measured(claim, worst, 1e-5)


def test_engines_hold_what_the_trainer_holds_after_every_update(link, measured):
    for number in range(3):
        version = link.sglang.student.change()
        if number:
            link.begin()
        link.push(version)
        assert all(sent > 0 and shared == 0 for sent, shared in link.said)
        link.end(version)
        _error(link, version, measured, "SGLang's log-probabilities after a planned update, against transformers")


def test_both_transports_leave_the_same_weights(link):
    student = link.sglang.student
    version = student.change()
    link.begin()
    link.push(version)
    link.end(version)
    planned = [engine.checksum for engine in link.sglang.engines]
    student.version += 1
    link.sglang.pool.push(student.export, student.version)  # the same model through SGLang's update API
    assert planned[0] is not None
    assert [engine.checksum for engine in link.sglang.engines] == planned


def test_an_update_that_is_refused_leaves_the_engines_out_of_rotation(link, measured):
    student = link.sglang.student
    version = student.change()
    link.begin()
    with pytest.raises(EngineError, match=r"engine 0 rank 0: TransportError: .* do not agree on the update: version"):
        link.push(version, asked=version + 1)
    assert all("do not agree on the update: version" in said for said in link.said)
    assert [engine.version for engine in link.sglang.engines] == [None, None]
    version = student.change()
    link.push(version)
    link.end(version)
    _error(link, version, measured, "SGLang's log-probabilities after a planned update, against transformers")


def test_engines_read_the_trainers_memory(sglang, measured):
    """The servers are no children of the trainer's processes.  Connecting ends the connection of before, and this one
    is closed: afterwards the servers are in no group."""
    link = Link(sglang, shared=True)
    try:
        for number in range(2):
            version = sglang.student.change()
            if number:
                link.begin()
            link.push(version)
            assert all(sent == shared > 0 for sent, shared in link.said)
            if number:
                sglang.run(link.engines.close())  # servers take requests only in a session
            link.end(version)
        _error(
            link, version, measured, "SGLang's log-probabilities after an update in shared memory, against transformers"
        )
    finally:
        link.trainers.kill()
