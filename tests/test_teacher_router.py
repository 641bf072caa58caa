"""A teacher on SGLang servers behind the real sglang-router: the same scores, and who is told what when something fails.

The servers and the router are shared; the tests that damage them come last, in this order.
"""

from __future__ import annotations

import os
import re
import signal

import pytest

from megatron_tropd.errors import EngineError
from tests.hf_models import VOCAB_SIZE, save_hf_checkpoint
from tests.ranks import free_port
from tests.routers import needs_router, routing
from tests.teacher_servers import Fleet, check_scores, model_of, rollouts_to_score, serving, settings_of
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.servers, needs_router]

TEXT = [[3, 9, 20, 4], [5, 6]]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return save_hf_checkpoint(tmp_path_factory.mktemp("teacher") / "hf", "qwen3")


@pytest.fixture(scope="module")
def handles(hf_dir, tmp_path_factory):
    """Two servers of somebody else."""
    with serving(hf_dir, tmp_path_factory.mktemp("servers"), 2) as found:
        yield found


@pytest.fixture(scope="module")
def router(handles, tmp_path_factory):
    with routing([handle.url for handle in handles], tmp_path_factory.mktemp("router") / "log") as found:
        yield found


def _behind(handles, router_url, **changes):
    return {"urls": tuple(handle.url for handle in handles), "router_url": router_url, **changes}


def _work(fleet):
    """What the servers have computed so far, by server."""
    return [fleet.loop.run(server._load()).work for server in fleet.fleet.servers]


@pytest.mark.thorough
def test_scores_are_right_and_both_servers_work(hf_dir, handles, router, tmp_path):
    rollouts = rollouts_to_score(24)
    with Fleet(hf_dir, tmp_path, **_behind(handles, router.url)) as fleet:
        before = _work(fleet.up())
        check_scores(rollouts, fleet.begin(rollouts))
        assert all(a != b for a, b in zip(before, _work(fleet), strict=True)), "the router left a server idle"
        assert not any(server.requests_in_flight for server in fleet.fleet.servers), "requests went past the router"
        assert fleet.fleet.router.requests_in_flight == fleet.fleet.counts["retries"] == 0


def _scorer(hf_dir, tmp_path, **changes):
    from megatron_tropd.teacher.server.scorer import ServerScorer

    return ServerScorer(settings_of(hf_dir, tmp_path, **changes), model_of(hf_dir), agreement=1e-4)


def _logprobs(hf_dir, tmp_path, changes):
    """On this rank: what the servers and the router say of a text."""
    scorer = _scorer(hf_dir, tmp_path, **changes)
    try:
        return scorer.logprobs_of(TEXT, vocab_size=VOCAB_SIZE)
    finally:
        scorer.close()


@pytest.mark.thorough
def test_a_router_before_other_servers_is_refused(ranks, hf_dir, handles, router, tmp_path):
    assert ranks(1).run(_logprobs, hf_dir, tmp_path, _behind(handles, router.url))
    other = save_hf_checkpoint(tmp_path / "other", "qwen3", seed=5)
    with serving(other, tmp_path / "servers", 1) as (stranger,):
        changes = _behind([stranger], router.url)
        with pytest.raises(AssertionError, match=r"and the router \(--teacher-router-url .*\) give the same text"):
            ranks(1).run(_logprobs, other, tmp_path, changes)


def test_a_router_that_nobody_answers_at_is_named(hf_dir, handles, tmp_path):
    url = f"http://127.0.0.1:{free_port()}"
    message = rf"the router \(--teacher-router-url {url}\) did not answer within 1 s \(--sglang-start-timeout\)"
    changes = _behind(handles, url, start_timeout_s=1.0)
    with Fleet(hf_dir, tmp_path, **changes) as fleet, pytest.raises(EngineError, match=message):
        fleet.up()


@pytest.mark.thorough
def test_a_router_that_is_killed_in_the_middle_is_named(hf_dir, handles, tmp_path):
    urls = [handle.url for handle in handles]
    with (
        routing(urls, tmp_path / "log") as mine,
        Fleet(hf_dir, tmp_path, **_behind(handles, mine.url, start_timeout_s=10.0)) as fleet,
    ):
        futures = fleet.up().begin(rollouts_to_score(300))
        wait_for(lambda: fleet.fleet.router.received_bytes)
        mine.kill()
        errors = [future.exception(timeout=200) for future in futures]
        assert any(errors), "the router was killed too late"
        named = f"the router (--teacher-router-url {mine.url}) did not answer within 10 s"
        assert all(error is None or named in str(error) for error in errors), errors
        assert all(server.is_up and not server.failures for server in fleet.fleet.servers), "it is not their fault"


def test_one_server_that_works_is_progress_of_all(hf_dir, handles, router, tmp_path):
    """The other is stopped: its last report stands, and is no progress."""
    with Fleet(hf_dir, tmp_path, **_behind(handles, router.url, request_timeout_s=4.0)) as fleet:
        fleet.up()
        seen = fleet.loop.run(fleet.fleet.router._load()).work
        os.killpg(handles[1].pid, signal.SIGSTOP)
        try:
            stopped = fleet.loop.run(fleet.fleet.router._load()).work
            assert stopped == seen
            fleet.loop.run(fleet.fleet.servers[0].logprobs([3, 4, 5, 6]))
            assert fleet.loop.run(fleet.fleet.router._load()).work != seen
        finally:
            os.killpg(handles[1].pid, signal.SIGCONT)


def test_silence_of_all_servers_ends_a_request(hf_dir, handles, router, tmp_path):
    message = r"the router \(.*\): prompt 0, sample 0: no answer, and no sign of progress from .* for 2 s"
    with Fleet(hf_dir, tmp_path, **_behind(handles, router.url, request_timeout_s=2.0)) as fleet:
        fleet.up()
        for handle in handles:
            os.killpg(handle.pid, signal.SIGSTOP)
        try:
            (future,) = fleet.begin(rollouts_to_score(1))
            wait_for(lambda: fleet.fleet.counts["retries"] or future.done())
            assert not future.done()
            assert all(server.last_error and not server.is_up for server in fleet.fleet.servers)
        finally:
            for handle in handles:
                os.killpg(handle.pid, signal.SIGCONT)
        check_scores(rollouts_to_score(1), [future])
        assert re.search(message, fleet.fleet.servers[0].last_error)


def test_a_server_that_is_killed_behind_the_router_loses_nothing(hf_dir, handles, router, tmp_path):
    rollouts = rollouts_to_score(160)
    with Fleet(hf_dir, tmp_path, **_behind(handles, router.url)) as fleet:
        futures = fleet.up().begin(rollouts)
        wait_for(lambda: fleet.fleet.router.received_bytes)
        os.killpg(handles[1].pid, signal.SIGKILL)
        check_scores(rollouts, futures)
        again = rollouts_to_score(8)
        check_scores(again, fleet.begin(again))
        assert not any(server.given_up for server in fleet.fleet.servers)
