"""What ends a request is silence of the server, not the time that its answer takes."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from megatron_tropd.rollout.sglang.api.generation import group_requests
from megatron_tropd.rollout.sglang.engine import Engine
from megatron_tropd.rollout.sglang.fleet import GenerationJob
from megatron_tropd.sglang.errors import EngineTimeout
from megatron_tropd.sglang.settings import SGLangSettings
from tests.hf_models import make_hf_model
from tests.sglang_helpers import Student, check_rollouts, make_pool, params, requests_of
from tests.sglang_replies import (
    ARCH,
    GOOD,
    STOP,
    VERSION,
    VOCAB_SIZE,
    FakeEngine,
    Reply,
    answer,
    engine_at,
    generate_three,
    http,
    make_samples,
)
from tests.sglang_replies import REQUESTS as GIVEN

FLAG = "--sglang-request-timeout"


# ---- a fake server, which shows what a real one shows only in trouble ----


def _loads(**fields):
    """Answers /v1/loads with ``fields``; those that are iterators give another value each time."""

    def reply(_body: bytes) -> Reply:
        entry = {key: next(value) if hasattr(value, "__next__") else value for key, value in fields.items()}
        return answer({"loads": [{"timestamp": 1.0, "num_running_reqs": 0, "num_waiting_reqs": 0, **entry}]})

    return reply


WORKING = {
    "decoding": lambda: {"num_running_reqs": 1, "timestamp": itertools.count()},
    "a long prefill, in which no request runs yet": lambda: {"total_prefill_uncached_tokens": itertools.count()},
}


@pytest.mark.slow
@pytest.mark.parametrize("work", sorted(WORKING))
def test_an_answer_may_take_several_times_the_timeout_while_the_server_works(work):
    """The answer comes after 40 signs of work; 20 are asked for in one timeout."""
    body = make_samples(1, samples=3, max_new=5)
    silence, asked = 3.0, threading.Semaphore(0)
    loads = _loads(**WORKING[work]())

    def slow(_body: bytes) -> Reply:
        for _ in range(40):
            asked.acquire()
        return answer(body)

    def counted(request: bytes) -> Reply:
        asked.release()
        return loads(request)

    with FakeEngine({"/generate": slow, "/v1/loads": counted}) as server:
        with engine_at(server, request_timeout_s=silence) as (engine, run):
            start = time.monotonic()
            rollouts = run(generate_three(engine))
        assert len(rollouts) == 3 and time.monotonic() - start > silence
        assert server.asked.count("/generate") == 1


HANGS = Reply(b"", "hang")
SILENT = {
    "it has forgotten the request and is idle": (HANGS, _loads(timestamp=itertools.count()), "running 0, waiting 0"),
    "its queue is stuck": (HANGS, _loads(timestamp=itertools.count(), num_waiting_reqs=3), "running 0, waiting 3"),
    "its scheduler is stuck": (HANGS, _loads(num_running_reqs=2), "reports requests running 2"),
    "it never says what it does": (HANGS, Reply(http(b"", "404 Not Found")), "loads.*: HTTP 404"),
    "nothing of it answers": (HANGS, HANGS, "loads.*no answer within"),
    "it says nonsense": (HANGS, answer({"loads": [{"num_running_reqs": True}]}), "num_running_reqs is True; expected"),
    "half an answer is all that comes": (Reply(b"HTTP/1.1 200 OK\r\n\r\n[", "hang"), _loads(), "running 0, waiting 0"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("why", sorted(SILENT))
@pytest.mark.fault(number=17)
def test_silence_ends_a_request_and_names_the_flag(why):
    reply, loads, state = SILENT[why]
    message = rf"engine 0 \(.*\): step 5, prompt 0: no answer, and no sign of progress.* for 2 s \({FLAG}\).*{state}"
    replies = {"/generate": reply, "/v1/loads": loads}
    with FakeEngine(replies) as server, engine_at(server, request_timeout_s=2.0) as (engine, run):
        with pytest.raises(EngineTimeout, match=message) as failure:
            run(generate_three(engine))
        with pytest.raises(EngineTimeout, match=rf"scoring 3 tokens: no answer.*\({FLAG}\)"):
            run(engine.score([3, 4, 5], None))
    assert f"raise {FLAG}" in str(failure.value)


CONTROL = {
    "/model_info": lambda engine: engine.check_health(),
    "/pause_generation": lambda engine: engine.pause("retract"),
    "/update_weight_version": lambda engine: engine.set_version(4),
    "/begin_weight_update": lambda engine: engine.begin_update(),
}


@pytest.mark.parametrize("path", sorted(CONTROL))
def test_a_control_call_has_a_deadline_of_the_same_flag(path):
    message = rf"engine 0 .*no answer within 0.3 s; .*raise {FLAG}"
    with (
        FakeEngine({path: HANGS}) as server, engine_at(server, request_timeout_s=0.3) as (engine, run),
        pytest.raises(EngineTimeout, match=message),
    ):  # fmt: skip
        run(CONTROL[path](engine))


# ---- the other ranks, which wait ----


def _write_on_two_ranks(url, version):
    """Body: a batch that takes far longer than the timeout of the collectives in which the other rank waits."""
    import torch.distributed as dist

    settings = SGLangSettings(
        hf_dir=Path(), log_dir=Path(), urls=(url,), dtype="float32", request_timeout_s=2.0, transport="bytes"
    )
    student = Student(make_hf_model("qwen3"))
    pool = make_pool(settings, ARCH, student, vocab_size=VOCAB_SIZE, stop_token_ids=set(STOP))
    group = dist.group.WORLD
    usual = group._get_backend(torch.device("cpu")).options._timeout
    try:
        pool.push(student.export, version)
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=6), group)
        start = time.monotonic()
        rollouts = pool.generate([replace(r, token_ids=(3, 4, 5, 6)) for r in GIVEN], params(), version)
        return len(rollouts), time.monotonic() - start
    finally:
        dist.distributed_c10d._set_pg_timeout(usual, group)
        pool.close()


@pytest.mark.timeout(300)
def test_a_batch_may_take_longer_than_the_timeout_of_the_collectives(ranks):
    """The other rank waits in a collective; it hears in time that the servers still write."""
    body, loads = make_samples(1, samples=3, max_new=5), _loads(num_running_reqs=1, timestamp=itertools.count())
    told = [""]

    def take(request: bytes) -> Reply:
        told[0] = json.loads(request)["weight_version"] or told[0]
        return answer(GOOD["/update_weights_from_tensor"])

    def slow(_body: bytes) -> Reply:
        time.sleep(15.0)
        return answer(json.loads(json.dumps(body).replace(f'"{VERSION}"', json.dumps(told[0]))))

    replies = {
        "/generate": slow, "/v1/loads": loads, "/weights_checker": Reply(http(b"", "404 Not Found")),
        "/update_weights_from_tensor": take, "/model_info": lambda _body: answer({"weight_version": told[0]}),
    }  # fmt: skip
    with FakeEngine(replies) as server:
        results = ranks(2).run(_write_on_two_ranks, server.url, VERSION)
    assert [count for count, _ in results] == [3, 3] and all(seconds > 12 for _, seconds in results)


# ---- real servers ----


def _pids(group: int) -> dict[int, str]:
    """Process ids and names of a process group."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                in_group = entry.joinpath("stat").read_text().rpartition(")")[2].split()[2] == str(group)
                name = entry.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if in_group:
                found[int(entry.name)] = name
    return found


def _scheduler(engine) -> int:
    (pid,) = [pid for pid, name in _pids(engine.server.pid).items() if "scheduler" in name]
    return pid


async def _until_it_writes(engine) -> None:
    """Until the scheduler reports a further piece of work while requests run."""
    first = (await engine._load()).work
    while (load := await engine._load()).work == first or not load.running:
        await asyncio.sleep(0.005)


REQUESTS = requests_of(1, samples=32, max_new=240)
"""Some of the samples get long, whatever stop tokens are drawn."""


def test_a_server_that_is_slow_but_decodes_is_not_given_up(sglang):
    """Its scheduler is stopped twice, for less than the timeout but together for longer."""
    sglang.push()
    version, timeline = sglang.student.change(), []
    settings = replace(sglang.settings, urls=(sglang.engines[0].server.url,), request_timeout_s=16.0)
    pool = make_pool(settings, sglang.arch, sglang.student)
    (engine,) = pool._fleet.engines
    pid = _scheduler(sglang.engines[0])

    async def hold_up():
        for _ in range(2):
            await _until_it_writes(engine)
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(9.0)
            os.kill(pid, signal.SIGCONT)
        timeline.append("held up twice")

    async def write(job):
        held = asyncio.create_task(hold_up())
        await pool._fleet.generate(job)
        timeline.append("written")
        await held

    try:
        pool.push(sglang.student.export, version)
        job = GenerationJob(requests=REQUESTS, params=params(), version=version)
        pool._loop.run(write(job))
        counts = pool.counts
    finally:
        pool.close()
    assert timeline == ["held up twice", "written"], "the prompt waited longer than the timeout"
    assert check_rollouts(job.rollouts(), REQUESTS, sglang.student.model, version) < 1e-5
    assert counts["restarts"] == counts["reissued"] == counts["bad_responses"] == 0


@pytest.fixture
def impatient(sglang):
    """An engine at the first running server that waits for five seconds only, and the version of its weights."""
    version = sglang.push()
    url = sglang.engines[0].server.url
    engine = Engine(7, replace(sglang.settings, urls=(url,), request_timeout_s=5.0), sglang.arch, None, url)
    sglang.run(engine.start())
    engine.version = version
    yield engine
    sglang.run(engine.close())
    sglang.run(sglang.engines[0].abort_all())


@pytest.mark.parametrize("stopped", ["scheduler", "server"])
@pytest.mark.fault(number=17)
def test_a_stopped_server_ends_the_request_with_the_flag_and_the_last_sign(sglang, impatient, stopped):
    first, rules = sglang.engines[0], sglang.pool._fleet._rules
    pids = [_scheduler(first)] if stopped == "scheduler" else list(_pids(first.server.pid))
    (prompt,) = group_requests(REQUESTS)

    async def write():
        task = asyncio.create_task(impatient.generate(prompt, REQUESTS, params(), impatient.version, rules))
        while impatient._watch._worked_at is None and not task.done():
            await asyncio.sleep(0.005)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        await task

    message = (
        rf"engine 7 .*: step 5, prompt 0: no answer, and no sign of progress .* for 5 s \({FLAG}\): the last one was "
        r"seen \d+\.\d s ago; it reports requests running \d+"
    )
    try:
        with pytest.raises(EngineTimeout, match=message):
            sglang.run(write())
        with pytest.raises(EngineTimeout, match=rf"scoring 3 tokens: .*\({FLAG}\)"):
            sglang.run(impatient.score([3, 4, 5], rules))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_paused_server_is_silent(sglang, impatient):
    sglang.run(sglang.engines[0].pause("retract"))
    try:
        with pytest.raises(EngineTimeout, match=rf"{FLAG}.*requests running 0"):
            sglang.run(impatient.score([3, 4, 5], sglang.pool._fleet._rules))
    finally:
        sglang.run(sglang.engines[0].resume())


def test_the_load_of_a_server_is_what_it_does(sglang):
    """The counters that are read are in the answers of the real server: an idle one stands still, a score is work."""
    sglang.push()
    engine = sglang.engines[0]
    before = sglang.run(engine._load())
    assert sglang.run(engine._load()) == before and (before.running, before.waiting) == (0, 0)
    assert GOOD["/v1/loads"]["loads"][0].keys() <= sglang.run(engine._get("/v1/loads"))["loads"][0].keys()
    sglang.run(engine.score(list(range(3, 40)), sglang.pool._fleet._rules))
    deadline = time.monotonic() + 60  # reported when the scheduler is idle again
    while sglang.run(engine._load()).work == before.work and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sglang.run(engine._load()).work != before.work
