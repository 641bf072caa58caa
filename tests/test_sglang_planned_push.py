"""A pool whose weights are planned, on real servers: what it does when a planned update fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.rollout.sglang.planned.control import PlannedEngines
from megatron_tropd.rollout.sglang.planned.push import MAX_FAILURES, PlannedPush, TrainerWeights
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.plan.types import Placement
from tests.planned_ranks import as_torch, fill
from tests.sglang_helpers import check_rollouts, params, requests_of

POISON = 0x7FC00001


@pytest.fixture
def pool(sglang):
    """One trainer rank; its parameters are always those of ``sglang.student``."""
    layout, student = ParallelLayout(), sglang.student

    def live():
        hf = {name: tensor.numpy().view(np.uint32) for name, tensor in student.model.state_dict().items()}
        return as_torch(fill(rank_boxes(sglang.arch, layout, 0), hf, POISON, "float32"), "float32")

    held = live()

    def current():
        return {name: held[name] for name in held}

    def refresh():
        for name, tensor in live().items():
            held[name].copy_(tensor)

    weights = TrainerWeights(layout=layout, params=current)
    planned = PlannedPush(sglang.settings, sglang.arch, weights)
    made = sglang.other_pool(planned=planned)
    made.refresh = refresh
    yield made
    made.close()
    sglang.push()  # the next test finds servers that its own pool knows


def _push(sglang, pool, measured) -> None:
    version = sglang.student.change()
    pool.refresh()
    pool.push(sglang.student.export, version)
    requests = requests_of(4, max_new=8)
    worst = check_rollouts(pool.generate(requests, params(), version), requests, sglang.student.model, version)
    measured("SGLang's log-probabilities after a push of a planned pool, against transformers", worst, 1e-5)


def _break(monkeypatch) -> None:
    """The engines expect another version than is sent, and refuse."""
    receive = PlannedEngines.receive
    monkeypatch.setattr(PlannedEngines, "receive", lambda self, version: receive(self, version + 1))


def test_a_failed_planned_update_is_made_good_and_planned_again(sglang, pool, monkeypatch, measured):
    _push(sglang, pool, measured)
    assert pool.counts.get("planned_failed", 0) == 0
    plan, here = pool._planned._sender.plan, Placement(node=0, gpu=0)
    assert (plan.source_placements, plan.engine_placements) == ((here,), ((here,), (here,)))
    with monkeypatch.context() as broken:
        _break(broken)
        _push(sglang, pool, measured)
    assert pool.counts["planned_failed"] == 1
    _push(sglang, pool, measured)
    assert pool.counts["planned_failed"] == 1, "a new connection did not work"


def _lose_a_tensor(monkeypatch) -> None:
    build = PlanSpec.build

    def without_the_last(spec):
        plan = build(spec)
        return replace(plan, messages=plan.messages[:-1])

    monkeypatch.setattr(PlanSpec, "build", without_the_last)


def test_a_plan_that_is_not_whole_is_not_carried_out(sglang, pool, monkeypatch, measured, caplog):
    _lose_a_tensor(monkeypatch)
    _push(sglang, pool, measured)
    assert pool.counts["planned_failed"] == 1 and "of engine 1 rank 0: elements from" in caplog.text


def test_planned_updates_are_given_up_after_failures_in_a_row(sglang, pool, monkeypatch, measured):
    _break(monkeypatch)
    for _ in range(MAX_FAILURES + 1):
        _push(sglang, pool, measured)
    assert pool.counts["planned_failed"] == MAX_FAILURES
