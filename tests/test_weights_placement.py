"""Where ranks are, as they say it themselves, and what a plan makes of it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.plan.placement import Location, location, number_placements, ranks_on_one_gpu
from megatron_tropd.weights.plan.spec import PlanSpec
from megatron_tropd.weights.plan.types import Placement
from tests.weight_cases import arch


def _at(machine: str, device: str) -> Location:
    return Location(machine=machine, device=device)


SOURCES = [_at("a", "gpu-1"), _at("a", "gpu-2"), _at("b", "gpu-1"), _at("b", "gpu-3")]
ENGINES = [[_at("b", "gpu-3"), _at("b", "gpu-4")], [_at("c", "gpu-1"), _at("a", "gpu-1")]]


def test_placements_are_numbered_by_machine_and_device():
    sources, engines = number_placements(SOURCES, ENGINES)
    assert sources == (
        Placement(node=0, gpu=0),
        Placement(node=0, gpu=1),
        Placement(node=1, gpu=2),
        Placement(node=1, gpu=3),
    )
    assert engines == (
        (Placement(node=1, gpu=3), Placement(node=1, gpu=4)),
        (Placement(node=2, gpu=5), Placement(node=0, gpu=0)),
    )


@pytest.mark.slow
def test_processes_on_this_machine_are_in_one_place():
    script = (
        "import dataclasses, json, torch\n"
        "from megatron_tropd.weights.plan.placement import location\n"
        "print(json.dumps(dataclasses.asdict(location([torch.ones(1)]))))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert Location(**json.loads(said.stdout)) == location([]) == location([torch.ones(1)])
    assert location([]).device == "cpu"


def test_ranks_on_one_gpu_are_named():
    assert ranks_on_one_gpu(SOURCES, ENGINES) == "trainer rank 3 and engine 0 rank 0"
    assert ranks_on_one_gpu(SOURCES[:3], ENGINES[:1]) == ""
    here = location([])
    assert ranks_on_one_gpu([here], [[here]]) == "", "host memory is shared by everybody"


@pytest.mark.parametrize("engine_at, sender", [
    (_at("b", "gpu-9"), 2),  # on the node
    (_at("b", "gpu-3"), 3),  # on the GPU
    (_at("a", "gpu-2"), 1),
])  # fmt: skip
def test_the_nearest_replica_sends(engine_at, sender):
    source_placements, engine_placements = number_placements(SOURCES, [[engine_at]])
    spec = PlanSpec(
        arch=arch("qwen3"), layout=ParallelLayout(dp=4), engines=(EngineLayout(),), dtype="float32",
        bucket_bytes=1 << 30, source_placements=source_placements, engine_placements=engine_placements,
    )  # fmt: skip
    senders = {message.source for message in spec.build().messages}
    if sender == 2:  # both ranks of the node, one as much as the other
        assert senders == {2, 3}
    else:
        assert senders == {sender}
    assert PlanSpec.from_json(spec.to_json()) == spec
    assert (
        dataclasses.replace(spec, engine_placements=number_placements(SOURCES, [[_at("z", "gpu-0")]])[1]).build()
        != spec.build()
    )
