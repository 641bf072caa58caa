"""Updates of weights that break off, or that a server takes otherwise than it says: nothing is written before the weights
are whole and right."""

from __future__ import annotations

import time

import pytest

from megatron_tropd.sglang.api import client
from tests.faulty_answers import Play, reset_after
from tests.faulty_runs import refusal, running
from tests.sglang_replies import answer


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts: hundreds of answers make the client try again."""
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.002)


@pytest.mark.slow
@pytest.mark.fault(number=20)
def test_an_update_that_breaks_off_anywhere_is_sent_again_whole(seen):
    """At every bucket, before and after the server took it, in the answer's every byte."""
    take, end = "/update_weights_from_tensor", "/end_weight_update"
    refused = Play(lambda _v, _n: answer({"success": False, "message": "out of memory"}))
    with running() as run:
        (server,) = run.servers
        buckets = server.asked.count(take)
        assert buckets >= 5
        cases = [
            (take, play, skip) for skip in (0, 2, buckets - 1) for play in ("reset at once", "reset somewhere", refused)
        ]
        length = len(answer({"success": True, "message": "Success"}).raw)
        last = [(take, _cut(place), buckets - 1) for place in range(0, length, 12)]
        others = [(path, play, 0) for path in (end, "/begin_weight_update", "/pause_generation", "/continue_generation")
                  for play in ("reset somewhere", "500")]  # fmt: skip
        others += [("/model_info", "a page", 0), ("/weights_checker", "the JSON {}", 0), ("/weights_checker", "500", 0)]
        for count, (path, play, skip) in enumerate([*cases, *last, *others], 1):
            run.forgive()
            with server.playing(play, path, times=1, skip=skip):
                assert max(run.push().values()) < 1e-5
                assert server.played == 1, (path, play, skip)
            assert run.pool.counts["restarts"] == count, (path, play, skip)
        run.write()
        run.forgive()
        start = time.monotonic()
        with server.playing("reset at once", take, skip=2):
            text, _ = refusal(run.push)
        assert f"engine 0 ({server.url})" in text and "no SGLang engine is left" in text, text
        seen(detect_s=time.monotonic() - start)
        text, _ = refusal(run.write)
        assert "hold weight version None" in text


def _cut(place: int) -> Play:
    return Play(lambda value, _numbers: reset_after(value, place))


@pytest.mark.slow
@pytest.mark.fault(number=20)
def test_one_server_that_took_half_an_update_is_out_while_the_other_writes():
    with running(2) as run:
        half, whole = run.servers
        with half.playing("reset at once", "/update_weights_from_tensor", skip=2):
            run.push()
            engines = run.pool._fleet.engines
            assert engines[0].given_up and engines[0].version is None and engines[1].version == run.student.version
            asked = half.asked.count("/generate")
            run.write()
        assert half.asked.count("/generate") == asked and whole.asked.count("/generate") > 0
        assert run.pool.counts["given_up"] == 1


LIES = ["nothing", "half", "swapped", "a bit", "no version"]


@pytest.mark.slow
@pytest.mark.fault(number=21)
@pytest.mark.parametrize("lie", LIES)
def test_success_without_effect_is_found_before_anything_is_written(lie, seen):
    with running() as run:
        (server,) = run.servers
        server.mishandle = lie
        asked = server.asked.count("/generate")
        text, seconds = refusal(run.push)
        assert "no SGLang engine is left" in text and f"engine 0 ({server.url})" in text, text
        assert ("differ from what was sent" in text) != (lie == "no version"), text
        assert server.asked.count("/generate") == asked and run.pool.weight_version is None
    seen(detect_s=seconds)


@pytest.mark.slow
@pytest.mark.fault(number=21)
@pytest.mark.parametrize("checker", ["sent", "absent"])
@pytest.mark.parametrize("lie", ["nothing", "half", "swapped"])
def test_where_the_digests_do_not_tell_the_probes_do(lie, checker):
    """A checker that hashes what it was sent, and a server without one; and then it is told the truth."""
    with running() as run:
        (server,) = run.servers
        server.mishandle, server.checker = lie, checker
        ((name, gap),) = run.push().items()
        assert gap > 1e-2 and server.url in name
        assert bool(run.pool.counts["unverified"]) == (checker == "absent")
        server.mishandle = ""
        assert max(run.push().values()) < 1e-5
        run.write()
