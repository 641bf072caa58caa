"""Rollouts by real SGLang servers behind the real sglang-router: prompts go there, weights to the servers."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest

from megatron_tropd.errors import EngineError
from megatron_tropd.models.hf_config import load_architecture
from megatron_tropd.sglang.settings import ServerSettings, SGLangSettings
from tests.hf_models import VOCAB_SIZE, make_hf_model, save_hf_checkpoint
from tests.ranks import free_port
from tests.routers import needs_router, routing
from tests.sglang_helpers import KEYS, Student, check_rollouts, make_pool, params, requests_of
from tests.teacher_servers import settings_of
from tests.waiting import wait_for

FLAG = "--rollout-router-url"


@pytest.fixture
def routed(sglang, tmp_path):
    """(pool, router): a pool that found the shared servers, and a router before them."""
    sglang.push()  # those that another test killed are up again
    urls = tuple(engine.server.url for engine in sglang.engines)
    with routing(urls, tmp_path / "log", key=KEYS.api) as router:
        settings = replace(sglang.settings, urls=urls, router_url=router.url, start_timeout_s=120.0)
        pool = make_pool(settings, sglang.arch, sglang.student)
        try:
            yield pool, router
        finally:
            pool.close()


def _push(sglang, pool) -> int:
    version = sglang.student.change()
    pool.push(sglang.student.export, version)
    return version


def _check(sglang, pool, version, requests) -> None:
    rollouts = pool.generate(requests, params(), version)
    assert check_rollouts(rollouts, requests, sglang.student.model, version) < 1e-5


@needs_router
def test_prompts_go_to_the_router_and_weights_to_the_servers(sglang, routed):
    pool, _ = routed
    requests = requests_of(10, samples=3, max_new=20)
    for _ in range(2):
        _check(sglang, pool, _push(sglang, pool), requests)
    fleet = pool._fleet
    assert fleet.router.received_bytes > 0 and fleet.router.prompts_in_flight == fleet.router.tokens_in_flight == 0
    assert not any(engine.prompts_in_flight for engine in fleet.engines) and not any(pool.counts.values()), pool.counts


@needs_router
def test_a_server_behind_it_with_other_weights_gets_them_before_more_is_written(sglang, routed):
    pool, _ = routed
    version = _push(sglang, pool)
    pool.submit(requests := requests_of(12, samples=2, max_new=60), params(), version)
    sglang.run(sglang.engines[0].set_version(999))  # what it writes from now on is told as written by another version
    rollouts = pool.finished(version)
    assert check_rollouts(rollouts, requests, sglang.student.model, version) < 1e-5
    assert pool.counts["stale_weights"] == 1 and pool.counts["restarts"] == 0, pool.counts
    assert {engine.version for engine in pool._fleet.engines} == {version}


@needs_router
@pytest.mark.thorough
def test_a_router_that_is_killed_is_named(sglang, routed):
    pool, router = routed
    version = _push(sglang, pool)
    router.kill()
    mine = pool._fleet.router
    mine._settings = replace(mine._settings, start_timeout_s=4.0)
    message = rf"the router \({FLAG} {router.url}\) did not answer within 4 s \(--sglang-start-timeout\)"
    with pytest.raises(EngineError, match=message):
        pool.generate(requests_of(2), params(), version)
    assert not any(pool.counts.values()), "the servers have no part in it"


@needs_router
@pytest.mark.thorough
def test_a_server_that_is_killed_behind_it_loses_nothing(sglang, routed):
    pool, _ = routed
    version = _push(sglang, pool)
    requests = requests_of(12, samples=2, max_new=60)

    def work():
        wait_for(lambda: pool._fleet.router.prompts_in_flight)
        os.killpg(sglang.engines[1].server.pid, signal.SIGKILL)

    killer = threading.Thread(target=work)
    killer.start()
    _check(sglang, pool, version, requests)
    killer.join(timeout=60)
    _check(sglang, pool, version, requests[:4])
    assert sum(engine.version == version for engine in pool._fleet.engines) == 1, "the dead one is known"


def _settings(kind, hf_dir, tmp_path, **changes):
    if kind == "teacher":
        return settings_of(hf_dir, tmp_path, **changes)
    defaults = {"hf_dir": hf_dir, "log_dir": tmp_path, "dtype": "float32", "python": "/bin/sh"}
    return SGLangSettings(**{**defaults, **changes})


@pytest.mark.parametrize(("kind", "flag", "urls"), [
    ("rollout", FLAG, "--rollout-engine-urls"), ("teacher", "--teacher-router-url", "--teacher-urls"),
])  # fmt: skip
def test_mistakes_are_told_before_anything_starts(tmp_path, kind, flag, urls):
    url = "http://127.0.0.1:3"
    for changes, message in (
        ({}, f"{flag} {url} needs {urls}: a router takes requests only"),
        ({"urls": (url + "/",)}, f"{flag} {url} is in {urls} too"),
        ({"urls": ("http://127.0.0.1:4",), "router_url": "localhost:3"}, f"{flag} localhost:3: expected http://host"),
        ({"urls": ("http://127.0.0.1:4",), "router_url": "http://10.0.0.3:3"}, "10.0.0.3 can be reached from other"),
    ):
        with pytest.raises(ValueError) as error:
            _settings(kind, tmp_path, tmp_path, **{"router_url": url, **changes})
        assert message in str(error.value)
    assert isinstance(_settings(kind, tmp_path, tmp_path, urls=("http://127.0.0.1:4",), router_url=url), ServerSettings)


def test_ids_that_only_the_student_has_cannot_be_banned_behind_a_router(tmp_path):
    hf_dir = save_hf_checkpoint(tmp_path / "hf", "qwen3")
    url = f"http://127.0.0.1:{free_port()}"
    settings = _settings("rollout", hf_dir, tmp_path, urls=(url,), router_url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=rf"{FLAG} .*: sglang-router drops the logit bias that .* the 4 ids that only"):
        make_pool(settings, load_architecture(hf_dir), Student(make_hf_model("qwen3")), vocab_size=VOCAB_SIZE - 4)
