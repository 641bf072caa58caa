"""A teacher on SGLang servers gives the scores, and the run, that the same teacher on the student's ranks gives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.reporting.rollout_samples import read_samples
from megatron_tropd.sglang.api.client import Client
from megatron_tropd.sglang.api.scores import read_top, score_body
from megatron_tropd.teacher.scorer import ScorerError
from megatron_tropd.teacher.server.top_k import SPARE
from megatron_tropd.types import Rollout, ScoreRequest
from tests.hf_models import VOCAB_SIZE, make_hf_model
from tests.routers import needs_router, routing
from tests.sglang_helpers import PYTHON, needs_sglang
from tests.teacher_servers import model_of, serving, settings_of
from tests.tiny_run import flags, make_world, reports_here
from tests.torchrun_jobs import process, start, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.servers, needs_sglang]

TOP_K = 7
TOLERANCE = 1e-5
STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), teacher="qwen3")


@pytest.fixture(scope="module")
def teacher_servers(world, tmp_path_factory):
    """URLs of two servers."""
    with serving(world / "teacher", tmp_path_factory.mktemp("servers"), 2) as handles:
        yield [handle.url for handle in handles]


def _rollouts() -> list[Rollout]:
    """With and without guidance, one that is guidance only, and one that ends in the model's last id."""
    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for uid in range(10):
        prompt, guidance, written = 1 + uid % 3, uid % 4, uid
        ids = torch.randint(0, VOCAB_SIZE, (prompt + guidance + written,), generator=generator).tolist()
        if uid == 7:
            ids[-1] = VOCAB_SIZE - 1
        rollouts.append(
            Rollout(prompt_uid=uid, sample_index=uid % 2, token_ids=tuple(ids), prompt_len=prompt,
                    guidance_len=guidance, logprobs=(0.0,) * written, weight_version=(0, 0), finish="stop")
        )  # fmt: skip
    return rollouts


def _scores_of_both(world, logs, urls, student, top_k):
    """On this rank: (logprob, top-k ids, top-k log-probabilities) by rollout, of the model here and of the servers, and
    what both say of a text."""
    import torch.distributed as dist

    from megatron_tropd.data.packing import plan_packs
    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.models.hf_config import load_architecture
    from megatron_tropd.parallel.groups import student_groups, teacher_groups
    from megatron_tropd.teacher.colocated import ColocatedScorer
    from megatron_tropd.teacher.megatron import MegatronTeacher
    from megatron_tropd.teacher.scorer import Destination
    from megatron_tropd.teacher.server.scorer import ServerScorer
    from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
    from megatron_tropd.weights.files.load import load_hf_into

    hf_dir = world / "teacher"
    arch = load_architecture(hf_dir)
    mine, theirs = student_groups(student), teacher_groups(ParallelLayout(dp=student.world_size))
    model = build_gpt_model(arch, theirs)
    load_hf_into(model, HfCheckpoint.open(hf_dir, arch), arch, theirs.layout, dist.get_rank())
    here = ColocatedScorer(
        MegatronTeacher(model, theirs, vocab_size=VOCAB_SIZE, max_tokens_per_microbatch=64, logits_chunk_tokens=8)
    )
    there = ServerScorer(settings_of(hf_dir, logs, urls=urls), model_of(hf_dir), agreement=1e-4)
    rollouts, want = _rollouts(), ScoreRequest(top_k=top_k)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    owners = plan_packs(lengths, data_parallel_size=student.dp, max_tokens=64).owners
    destination, found = Destination(groups=mine, owners=owners), []
    try:
        text = [there.logprobs_of([[3, 9, 20, 4], [5, 130]], vocab_size=VOCAB_SIZE),
                here.logprobs_of([[3, 9, 20, 4], [5, 130]], vocab_size=VOCAB_SIZE)]  # fmt: skip
        for scorer in (here, there):
            for index in range(dist.get_rank(), len(rollouts), dist.get_world_size()):  # each where it arrived
                scorer.submit(0, {index: rollouts[index]}, want)
            scores = scorer.scores(0, dict(enumerate(rollouts)), want, destination)
            found.append({i: (s.logprob, s.topk_ids, s.topk_logprobs) for i, s in scores.items()})
        return *found, text, there.metrics()
    finally:
        there.close()


@pytest.mark.parametrize(
    ("student", "top_k"),
    [
        (ParallelLayout(), TOP_K), (ParallelLayout(tp=2), TOP_K), (ParallelLayout(dp=2), 0),
        (ParallelLayout(pp=2), VOCAB_SIZE), (ParallelLayout(tp=2, pp=2), TOP_K),
    ],
    ids=[
        "student TP1", "student TP2", "student DP2, no top-k", "student PP2, top-k of all ids", "student TP2 PP2",
    ],
)  # fmt: skip
def test_scores_are_those_of_a_colocated_teacher(ranks, world, teacher_servers, tmp_path, student, top_k, measured):
    worst, scored = 0.0, set()
    results = ranks(student.world_size).run(
        _scores_of_both, world, tmp_path, tuple(teacher_servers), student, top_k
    )  # fmt: skip
    for here, there, (text, expected), metrics in results:
        assert here.keys() == there.keys()
        scored |= here.keys()
        for index, (logprob, ids, logprobs) in here.items():
            of_server = there[index]
            worst = max([worst, *(logprob - of_server[0]).abs().tolist()])
            if top_k:
                assert torch.equal(ids, of_server[1]) and ids.dtype == of_server[1].dtype
                worst = max([worst, *(logprobs - of_server[2]).abs().flatten().tolist()])
        for one, two in zip(text, expected, strict=True):
            worst = max(worst, *(abs(a - b) for a, b in zip(one, two, strict=True)))
        assert metrics["scored_tokens"] == sum(rollout.response_len for rollout in _rollouts())
        assert metrics["retries"] == metrics["restarts"] == 0 and metrics["bytes_per_token"] > 20
    assert scored == set(range(10))
    measured("scores of SGLang's teacher equal the colocated one's (nats, max abs)", worst, TOLERANCE)


def test_the_order_of_submission_does_not_matter_and_a_missing_rollout_is_named(world, teacher_servers, tmp_path):
    from megatron_tropd.teacher.server.scorer import ServerScorer

    scorer = ServerScorer(
        settings_of(world / "teacher", tmp_path, urls=tuple(teacher_servers)), model_of(world / "teacher"), agreement=1
    )
    rollouts = _rollouts()
    scorer.submit(0, dict(list(enumerate(rollouts))[1:]), ScoreRequest())
    try:
        with pytest.raises(ScorerError, match="9 of the 10 rollouts of step 1 were submitted"):
            scorer.scores(0, dict(enumerate(rollouts)), ScoreRequest(), None)
    finally:
        scorer.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"common_vocab_size": VOCAB_SIZE - 4}, r"of its probability to the 4 ids from 127 on.*colocated"),
        ({"model_type": "llama"}, r"holds a model of type 'qwen3', --teacher-hf-checkpoint one of type llama"),
        ({"longest": 4000}, r"are 4000: raise --teacher-sglang-max-total-tokens"),
        ({"rows": -3}, r"takes token id 128; the model of --teacher-hf-checkpoint has 128 ids"),
        ({"rows": 3}, r"refuses token id 133; the model of --teacher-hf-checkpoint has 134 ids"),
        ({"dtype": "bfloat16"}, r"holds weights in 'float32', this run's are bfloat16"),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_the_start(world, teacher_servers, tmp_path, changes, message):
    from megatron_tropd.teacher.server.scorer import ServerScorer

    model = model_of(world / "teacher")
    settings = settings_of(
        world / "teacher", tmp_path, urls=(teacher_servers[0],), dtype=changes.pop("dtype", "float32")
    )
    rows = VOCAB_SIZE + changes.pop("rows", 0)
    model = replace(model, arch=replace(model.arch, vocab_size=rows), **changes)
    scorer = ServerScorer(settings, model, agreement=1e-4)
    try:
        with pytest.raises(ScorerError, match=message):
            scorer.logprobs_of([[3, 9, 20, 4], [5, 6]], vocab_size=rows)
    finally:
        scorer.close()


def test_the_flat_form_says_the_same_in_fewer_bytes(tmp_path):
    """Of a model with as many ids as Qwen's: the numbers of docs/teachers.md."""
    rows, top_k, written = 151936, 64 + SPARE, 100
    make_hf_model("qwen3", vocab_size=rows).save_pretrained(tmp_path / "hf")
    tokens = torch.randint(0, rows, (8 + written,), generator=torch.Generator().manual_seed(0)).tolist()

    async def ask(url):
        client, found, sizes = Client("server", url, None), [], []
        for flat in (True, False):
            before = client.received_bytes
            body = score_body(tokens, start=7, top_k=top_k, flat=flat)
            answer = await client.post("/generate", body, what="scores", timeout_s=120, admin=False)
            assert ("input_top_logprobs_val_flat_b64" in answer["meta_info"]) is flat
            found.append(read_top(answer, num_tokens=written, top_k=top_k, num_rows=rows))
            sizes.append((client.received_bytes - before) / written)
        await client.close()
        return found, sizes

    with serving(tmp_path / "hf", tmp_path / "servers", 1) as (server,):
        (flat, nested), (flat_bytes, nested_bytes) = asyncio.run(ask(server.url))
    assert (flat[0] == nested[0]).all() and (flat[1] == nested[1]).all()
    assert flat_bytes == pytest.approx(833, rel=0.02) and nested_bytes == pytest.approx(2437, rel=0.05)


def _numbers(reports):
    return [(report.loss, report.grad_norm) for report in reports]


def _worst(mine, theirs):
    assert len(mine) == len(theirs) > 0
    return max(abs(a - b) / abs(b) for m, t in zip(mine, theirs, strict=True) for a, b in zip(m, t, strict=True))


def _on_servers(world, run_dir, **changes):
    return flags(world, run_dir, teacher_placement="server", sglang_python=PYTHON, **changes)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_run_has_the_losses_of_a_colocated_teacher(ranks, world, teacher_servers, tmp_path, measured, tp, pp):
    changes = {"train_iters": STEPS, "tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    pool = ranks(max(tp * pp, 2))
    here = pool.run(reports_here, flags(world, tmp_path / "here", **changes))[0]
    argv = [*_on_servers(world, tmp_path / "there", **changes), "--teacher-urls", *teacher_servers]
    there = pool.run(reports_here, argv)[0]
    measured(
        "loss and gradient norm with a teacher on servers (relative)",
        _worst(_numbers(there), _numbers(here)),
        TOLERANCE,
    )
    assert there[0].metrics["teacher/wait_s"] >= 0 and there[0].metrics["teacher/scored_tokens"] > 0


@needs_router
def test_a_run_behind_a_router_has_the_losses_of_a_colocated_teacher(ranks, world, teacher_servers, tmp_path, measured):
    changes = {"train_iters": STEPS, "tensor_model_parallel_size": 2}
    here = ranks(2).run(reports_here, flags(world, tmp_path / "here", **changes))[0]
    with routing(teacher_servers, tmp_path / "log") as router:
        argv = _on_servers(world, tmp_path / "there", teacher_router_url=router.url, **changes)
        there = ranks(2).run(reports_here, [*argv, "--teacher-urls", *teacher_servers])[0]
    worst = _worst(_numbers(there), _numbers(here))
    measured("loss and gradient norm with a teacher on servers behind a router (relative)", worst, TOLERANCE)


@pytest.mark.thorough
def test_the_command_starts_a_server_and_starts_it_anew_when_it_is_killed(ranks, world, tmp_path, measured):
    num_steps = 5
    here = ranks(2).run(reports_here, flags(world, tmp_path / "here", train_iters=num_steps))[0]
    run_dir = tmp_path / "run"
    argv = _on_servers(
        world, run_dir, train_iters=num_steps, teacher_sglang_max_total_tokens=2048, teacher_num_servers=1
    )
    with start(argv, tmp_path) as job:
        wait_for_steps(run_dir / "metrics.jsonl", 2, job, timeout=400)
        os.killpg(process(job.pid, "server/launch.py"), signal.SIGKILL)
        assert job.wait(timeout=400) == 0, job.output[-4000:]
    steps = [r for r in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "step"]
    there = [(step["loss"], step["grad_norm"]) for step in steps]
    measured("the same where the server is killed in the middle (relative)", _worst(there, _numbers(here)), TOLERANCE)
    assert not [step for step in steps if "teacher/entropy" in step["metrics"]], "servers give none over all ids"
    shown = [sample.tokens for sample in read_samples(run_dir / "rollouts/step_0000001.jsonl")]
    assert {value for tokens in shown for value in tokens.teacher_entropy} == {None}
    assert any(top for tokens in shown for top in tokens.teacher_top)
    assert steps[0]["metrics"]["teacher/restarts"] == 0 and steps[-1]["metrics"]["teacher/restarts"] == 1
    assert sorted(path.name for path in (run_dir / "teacher").iterdir()) == [
        "sglang-0-start-1.log", "sglang-0-start-2.log",
    ]  # fmt: skip
