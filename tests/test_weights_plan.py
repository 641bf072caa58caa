"""Plans: proved, minimal, balanced, the same everywhere; and a proof that notices every change to one."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.weights.coordinates.engine_boxes import EngineLayout
from megatron_tropd.weights.coordinates.hf_shapes import hf_shapes
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.plan.planner import build_plan, source_params
from megatron_tropd.weights.plan.proof import ProofError, prove
from megatron_tropd.weights.plan.shards import PlanError, source_shards
from megatron_tropd.weights.plan.statistics import consecutive_placements, plan_stats
from megatron_tropd.weights.plan.types import Copy, Message, WeightPlan
from tests.weight_cases import BIG_CASES, CASES, VOCAB, Case, arch

SMALL_BUCKET = 4096


def make_plan(case: Case, **overrides) -> WeightPlan:
    options = {
        "dtype": "bfloat16",
        "bucket_bytes": SMALL_BUCKET,
        **overrides,
    }
    return build_plan(case.arch, case.layout, case.engines, **options)


def check(plan: WeightPlan, case: Case):
    return prove(plan, case.arch, case.layout)


@pytest.mark.parametrize("name", [*CASES, *BIG_CASES])
def test_every_plan_is_proved_and_minimal(name):
    case = {**CASES, **BIG_CASES}[name]
    plan = make_plan(case)
    proof = check(plan, case)
    assert proof.redundancy == 1.0 and proof.padding_elements > 0
    assert proof.staging_bytes <= SMALL_BUCKET // 2
    stats = plan_stats(plan)
    assert stats.bytes == proof.bytes_sent
    assert stats.buckets > 1, "the buckets are too large to say anything"


def _changed(plan: WeightPlan, at: int, copies: list[Copy]) -> WeightPlan:
    messages = list(plan.messages)
    messages[at : at + 1] = [replace(messages[at], copies=tuple(copies))] if copies else []
    return replace(plan, messages=tuple(messages))


def _strangers(case: Case, copy: Copy) -> list[int]:
    """Source ranks that do not hold what ``copy`` takes from its own."""

    def held(rank: int):
        boxes = rank_boxes(case.arch, case.layout, rank)
        return next((param for param in boxes if param.names == copy.source_names), None)

    mine = held(copy.source)
    return [rank for rank in range(case.layout.world_size) if held(rank) != mine]


def _moved(corner: tuple[int, ...], axis: int, by: int) -> tuple[int, ...]:
    return (*corner[:axis], corner[axis] + by, *corner[axis + 1 :])


def _mutants(case: Case, plan: WeightPlan, seed: int) -> Iterator[tuple[str, WeightPlan]]:
    """One wrong plan of every kind for a handful of copies."""
    draw = random.Random(seed)
    for _ in range(4):
        at = draw.randrange(len(plan.messages))
        message = plan.messages[at]
        copies = list(message.copies)
        number = draw.randrange(len(copies))
        copy = copies[number]

        def swap(new: Copy, at=at, copies=copies, number=number) -> WeightPlan:
            return _changed(plan, at, [*copies[:number], new, *copies[number + 1 :]])

        yield "copy dropped", _changed(plan, at, copies[:number] + copies[number + 1 :])
        yield "copy doubled", _changed(plan, at, [*copies, copy])
        yield "message dropped", _changed(plan, at, [])
        yield "message doubled", replace(plan, messages=(*plan.messages, message))
        later = replace(message, bucket=plan.num_buckets)
        yield "message sent again later", replace(plan, messages=(*plan.messages, later))
        by = draw.choice([-1, 1])
        yield "source moved", swap(replace(copy, source_start=_moved(copy.source_start, 0, by)))
        yield "target moved", swap(replace(copy, start=_moved(copy.start, len(copy.start) - len(copy.size), by)))
        grown = _moved(copy.size, len(copy.size) - 1, by)
        grown_bytes = copy.num_bytes // copy.size[-1] * grown[-1]
        yield "size changed", swap(replace(copy, size=grown, num_bytes=grown_bytes))
        yield "bytes miscounted", swap(replace(copy, num_bytes=copy.num_bytes + 2))
        yield "parameter unknown", swap(replace(copy, source_names=("decoder.nothing.weight",)))
        yield "target unknown", swap(replace(copy, name="model.nothing.weight"))
        yield "no such engine", swap(replace(copy, engine=len(case.engines)))
        for stranger in _strangers(case, copy)[:2]:
            new = Message(
                bucket=plan.num_buckets, source=stranger, engine=copy.engine, engine_rank=copy.engine_rank,
                copies=(replace(copy, source=stranger),),
            )  # fmt: skip
            rest = _changed(plan, at, copies[:number] + copies[number + 1 :])
            yield "wrong sender", replace(rest, messages=(*rest.messages, new))
        others = [c for c in copies if c.size == copy.size and c.name != copy.name and len(c.start) == len(copy.start)]
        if others:
            yield "wrong parameter", swap(replace(copy, name=others[0].name, start=others[0].start))


@pytest.mark.slow
def test_the_proof_kills_every_mutant():
    killed: dict[str, int] = {}
    for seed, (name, case) in enumerate(CASES.items()):
        plan = make_plan(case)
        for kind, mutant in _mutants(case, plan, seed):
            assert mutant.messages != plan.messages
            with pytest.raises(ProofError):
                check(mutant, case)
                pytest.fail(f"{kind} of {name!r} was not noticed")
            killed[kind] = killed.get(kind, 0) + 1
    assert sum(killed.values()) >= 500 and len(killed) >= 13, killed
    assert min(killed.values()) >= 5, killed


def test_the_proof_names_tensor_engine_and_rank():
    case = CASES["narrower engines"]
    plan = make_plan(case)
    at = next(i for i, message in enumerate(plan.messages) if (message.engine, message.engine_rank) == (1, 1))
    with pytest.raises(ProofError, match=r"model\..* \(.*\) of engine 1 rank 1: .*written by no copy"):
        check(_changed(plan, at, list(plan.messages[at].copies[1:])), case)


def test_padding_rows_of_an_engine_are_never_written():
    case = CASES["one to one"]
    plan = make_plan(case, bucket_bytes=1 << 20)
    (message,) = plan.messages
    copy = next(c for c in message.copies if c.name == "lm_head.weight")
    assert copy.size == (VOCAB, 16)
    longer = replace(copy, size=(VOCAB + 1, 16), num_bytes=copy.num_bytes + 32)
    with pytest.raises(ProofError, match=r"lm_head.weight .* is padding"):
        check(_changed(plan, 0, [longer if c is copy else c for c in message.copies]), case)


def test_a_sender_on_the_same_gpu_is_chosen_then_one_on_the_same_node():
    case = CASES["replicas share the work"]  # four replicas, four engines of one rank
    here = consecutive_placements(4)
    plan = make_plan(case, source_placements=here, engine_placements=[[place] for place in here])
    assert all(message.source == message.engine for message in plan.messages)
    assert plan_stats(plan).same_gpu_bytes == plan_stats(plan).bytes
    nodes = consecutive_placements(4, gpus_per_node=2)
    beside = [[replace(place, gpu=place.gpu + 2)] for place in nodes]
    plan = make_plan(case, source_placements=nodes, engine_placements=beside)
    stats = plan_stats(plan)
    assert stats.same_gpu_bytes == 0 and stats.same_node_bytes == stats.bytes
    far = consecutive_placements(4, first=4, gpus_per_node=2)
    plan = make_plan(case, source_placements=nodes, engine_placements=[[place] for place in far])
    assert plan_stats(plan).remote_bytes == plan_stats(plan).bytes
    check(plan, case)


def test_replicas_share_the_work():
    stats = plan_stats(make_plan(CASES["replicas share the work"]))
    assert stats.egress_max < 1.1 * stats.egress_mean
    assert stats.ingress_max == stats.ingress_mean


def test_a_source_that_lacks_rows_is_refused():
    """Ninety of a hundred rows are not a source."""
    case = CASES["narrower engines"]
    sources = source_params(case.arch, case.layout)
    for missing in range(len(sources)):
        with pytest.raises(PlanError, match=r"no source rank holds indices \d+ to \d+ of axis \d of "):
            source_shards(hf_shapes(case.arch), sources[:missing] + sources[missing + 1 :])
    with pytest.raises(PlanError, match="overlapping"):
        other = source_params(case.arch, ParallelLayout(tp=2))
        source_shards(hf_shapes(case.arch), [*sources, *other])


def test_a_bucket_must_hold_a_row():
    with pytest.raises(PlanError, match=r"one row of model.embed_tokens.weight has 16 elements, half a bucket holds 2"):
        make_plan(CASES["one to one"], bucket_bytes=136)


def test_placements_must_be_those_of_the_ranks():
    with pytest.raises(PlanError, match="placements of"):
        make_plan(CASES["narrower engines"], source_placements=consecutive_placements(3), engine_placements=[[], []])


_FRESH = """
import json, sys
from tests.weight_cases import CASES
from megatron_tropd.weights.plan.planner import build_plan
from megatron_tropd.weights.plan.proof import prove
case = CASES["experts in parts"]
plan = build_plan(case.arch, case.layout, case.engines, dtype="bfloat16", bucket_bytes=4096)
prove(plan, case.arch, case.layout)
print(json.dumps([plan.digest, sorted({"torch", "megatron", "transformers"} & set(sys.modules))]))
"""


def test_the_digest_is_the_same_in_every_process_and_planning_imports_no_torch():
    mine = make_plan(CASES["experts in parts"]).digest
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _FRESH], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True,
            timeout=120, check=True,
        )  # fmt: skip
        assert json.loads(done.stdout) == [mine, []]


def test_the_digest_tells_plans_apart():
    case = CASES["narrower engines"]
    digests = {
        make_plan(case).digest,
        make_plan(case, bucket_bytes=8192).digest,
        make_plan(case, dtype="float32").digest,
        make_plan(case, dtype="float16").digest,
        make_plan(CASES["one to one"]).digest,
        make_plan(replace(case, layout=ParallelLayout(tp=2, dp=2))).digest,
    }
    assert len(digests) == 6


def test_a_32b_model_is_planned_in_seconds(measured):
    """TP 8 x PP 4 to four engines of TP 8."""
    model = replace(
        arch(), vocab_size=151936, hidden_size=5120, ffn_hidden_size=25600, num_layers=64, num_attention_heads=64,
        num_query_groups=8, head_dim=128,
    )  # fmt: skip
    layout, engines = ParallelLayout(tp=8, pp=4), [EngineLayout(tp=8)] * 4
    start = time.process_time()
    plan = build_plan(model, layout, engines, dtype="bfloat16")
    seconds = time.process_time() - start
    proof = prove(plan, model, layout)
    assert proof.redundancy == 1.0
    measured("seconds to plan 32B from TP8 PP4 to four engines of TP8", seconds, 5.0)
