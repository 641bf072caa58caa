"""Rollout engines that misbehave in every way that a server can: the run goes on with whole, true rollouts of the
pushed weights, or ends soon with an error that names the engine; no token of unknown weights is taken."""

from __future__ import annotations

import contextlib
import time

import pytest

from megatron_tropd.rollout.sglang.api.generation import generate_body, group_requests
from megatron_tropd.sglang.api import client
from megatron_tropd.sglang.api.scores import score_body
from tests.faulty_answers import (
    ANOTHER,
    BROKEN,
    BUSY,
    NOT_JSON,
    NUMBERS,
    SHAPES,
    SILENT,
    STALE,
    WRITTEN,
    Play,
    reset_after,
)
from tests.faulty_runs import REQUESTS, Run, refusal, running
from tests.faulty_server import FaultyServer
from tests.hf_models import make_hf_model
from tests.sglang_helpers import check_rollouts, params, requests_of
from tests.sglang_replies import answer

MALFORMED = {**NOT_JSON, **SHAPES, **NUMBERS, **ANOTHER, **WRITTEN}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts: hundreds of answers make the client try again."""
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.002)


# ---- the fake itself ----


def test_the_miniature_answers_as_a_real_server_does(sglang):
    """The same tokens at temperature 0, log-probabilities, keys and types."""
    version = sglang.push()
    rules, (group, *_) = sglang.pool._fleet._rules, group_requests(REQUESTS)
    bodies = [
        generate_body(group, params(temperature=0.0), rules),
        {**score_body([3, 9, 20, 130, 7], start=1, top_k=4), "return_flat_raw_top_logprobs_b64": True},
        score_body([3, 9, 20], ids=[5, 130]),
    ]
    real = sglang.engines[0]
    with FaultyServer() as fake:
        run = Run(fake, request_timeout_s=30)
        try:
            run.student.model = sglang.student.model
            run.pool.push(run.student.export, version)
            (engine,) = run.pool._fleet.engines
            for body in bodies:
                theirs = sglang.run(real._ask(body, "test"))
                ours = run.pool._loop.run(engine._ask(body, "test"))
                _check_like(ours, theirs)
            for path in ("/model_info", "/server_info", "/v1/loads"):
                _check_like(run.pool._loop.run(engine._get(path)), sglang.run(real._get(path)), values=False)
        finally:
            run.pool.close()


_OWN = {"id", "weight_version", "version"}


def _check_like(ours, theirs, *, values=True) -> None:
    """``ours`` has nothing that ``theirs`` has not."""
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(ours, dict):
        assert ours.keys() <= theirs.keys()
        for key in ours.keys() - _OWN:
            _check_like(ours[key], theirs[key], values=values and not key.endswith("val_flat_b64"))
    elif isinstance(ours, list):
        assert len(ours) == len(theirs) or not values
        for one, two in zip(ours, theirs, strict=values):
            _check_like(one, two, values=values)
    elif values:
        assert ours == pytest.approx(theirs, abs=1e-5)


# ---- busy, broken, silent ----


@pytest.mark.slow
@pytest.mark.fault(number=17)
def test_a_server_that_is_busy_or_broken_for_a_while_loses_nothing():
    with running() as run:
        (server,) = run.servers
        for name in (*BUSY, *BROKEN):
            start = time.monotonic()
            with server.playing(name, times=2):
                run.write()
                assert server.played == 2, name
            waits = 1.0 if "with Retry-After" in name else 0.0
            assert waits <= time.monotonic() - start < waits * 2 + 5, name
        counts = run.pool.counts
        assert counts["restarts"] == counts["reissued"] == 2, "HTTP 500 is final; all else is asked again"
        assert counts["given_up"] == counts["bad_responses"] == counts["stale_weights"] == 0


@pytest.mark.slow
@pytest.mark.fault(number=17)
def test_a_server_that_is_busy_broken_or_silent_for_good_ends_the_run_by_name(seen):
    longest = 0.0
    with running() as run:
        (server,) = run.servers
        for name in [name for name in (*BUSY, *BROKEN, *SILENT) if "with Retry-After" not in name]:
            before = run.pool.counts
            run.forgive()
            with run.impatient(1.0) if name in SILENT else contextlib.nullcontext(), server.playing(name):
                text, seconds = refusal(run.write)
            longest = max(longest, seconds)
            assert server.url in text and "failed 4 times, at last: " in text and seconds < 30, (name, text)
            said = {"429": "busy (HTTP 429)", "503": "busy (HTTP 503)", "500": "HTTP 500: oh"}
            expected = said.get(name[:3], "--sglang-request-timeout" if name in SILENT else "Error")
            assert expected in text, (name, text)
            counts = run.pool.counts
            assert counts["reissued"] >= before["reissued"] + 4 and counts["restarts"] >= before["restarts"] + 3, name
            run.push()
            run.write()  # the same pool goes on when the server does
    seen(detect_s=longest)


@pytest.mark.slow
@pytest.mark.fault(number=17)
def test_a_server_that_is_busy_for_longer_than_the_deadline_of_a_control_call():
    with running() as run:
        (server,) = run.servers
        engine = run.pool._fleet.engines[0]
        with run.impatient(), server.playing("503 with Retry-After", "/pause_generation"):
            text, seconds = refusal(lambda: run.pool._loop.run(engine.pause("abort")))
    assert f"engine 0 ({server.url}): pause (abort): no answer within 0.3 s (before: busy (HTTP 503))" in text
    assert "--sglang-request-timeout" in text and seconds < 5


@pytest.mark.slow
@pytest.mark.fault(number=17)
def test_an_answer_that_is_reset_after_any_byte_is_asked_for_again(seen):
    """Several hundred positions, in the headers and in the content."""
    (request,) = requests_of(1, max_new=3)
    with running() as run:
        (server,) = run.servers
        engine, version = run.pool._fleet.engines[0], run.student.version
        (group,) = group_requests([request])
        rules = run.pool._fleet._rules
        value = run.pool._loop.run(engine._post("/generate", generate_body(group, params(), rules), what="test"))
        length, outcomes, start = len(answer(value).raw), set(), time.monotonic()
        for place in range(length + 1):
            again = Play(lambda _value, _numbers, place=place: reset_after(value, place), works=False)
            then = Play(lambda _value, _numbers: answer(value), works=False)
            with server.playing(_in_turn(again, then)):
                found = run.pool._loop.run(engine.generate(group, [request], params(), version, rules))
            assert list(found[0].token_ids[4:]) == value["output_ids"]
            outcomes.add(server.played)
        assert length > 500 and outcomes == {1, 2}, "only the whole answer is not asked for again"
        run.write()
    seen(detect_s=(time.monotonic() - start) / length)


def _in_turn(*plays: Play) -> Play:
    left = list(plays)
    return Play(lambda value, numbers: (left.pop(0) if len(left) > 1 else left[0]).reply(value, numbers), works=False)


# ---- malformed ----


@pytest.mark.slow
@pytest.mark.fault(number=18)
def test_a_malformed_answer_is_counted_and_its_prompt_is_written_again(caplog):
    with running() as run:
        (server,) = run.servers
        for count, name in enumerate(MALFORMED, 1):
            caplog.clear()
            with server.playing(name, times=1):
                run.write()
                assert server.played == 1
            run.counted(reissued=count, bad_responses=count)
            assert f"a prompt is written again: engine 0 ({server.url}): step 5, prompt " in caplog.text, name


@pytest.mark.slow
@pytest.mark.fault(number=18)
def test_malformed_answers_for_good_end_the_run_by_name(seen):
    longest = 0.0
    with running() as run:
        (server,) = run.servers
        for name in MALFORMED:
            run.forgive()
            with server.playing(name):
                text, seconds = refusal(run.write)
            longest = max(longest, seconds)
            assert f"failed 4 times, at last: engine 0 ({server.url}): step 5, prompt " in text, (name, text)
            assert seconds < 20
        run.push()
        run.write()
    seen(detect_s=longest)


@pytest.mark.slow
@pytest.mark.fault(number=18)
def test_a_server_that_answers_nonsense_at_once_does_not_draw_the_prompts_of_others():
    """It has always the least to do."""
    with running(2) as run:
        bad, good = run.servers
        with bad.playing("NaN"):
            run.write()
            run.counted(reissued=1, bad_responses=1)  # the second try is at the other one
            run.write(requests_of(12, max_new=4))
            before = good.asked.count("/generate")
            assert before > 12, "probes, and every prompt"
        counts = run.pool.counts
        assert 4 <= counts["bad_responses"] <= counts["reissued"] <= 13 and counts["restarts"] == 1
        assert [engine.version == run.student.version for engine in run.pool._fleet.engines] == [False, True]
        run.push()
        run.write()
        assert {engine.version for engine in run.pool._fleet.engines} == {run.student.version}


@pytest.mark.slow
@pytest.mark.fault(number=18)
def test_a_probe_that_is_answered_with_nonsense_is_asked_again():
    with running() as run:
        (server,) = run.servers
        for name in ("NaN", "a negative id", "too few log-probabilities", "a page", "the answer to another prompt"):
            run.forgive()
            with server.playing(name, times=1):
                assert max(run.push().values()) < 1e-5
                assert server.played == 1
        run.write()
        run.forgive()
        with server.playing("NaN"):
            text, _ = refusal(run.push)
    assert "failed to score the probes of weight version" in text and server.url in text and "NaN" in text


# ---- other weights ----


@pytest.mark.slow
@pytest.mark.fault(number=19)
@pytest.mark.parametrize("times", [1, 10**9], ids=["once", "for good"])
def test_what_other_weights_wrote_is_never_taken(times, caplog, seen):
    longest = 0.0
    with running() as run:
        (server,) = run.servers
        for name in STALE:
            before = run.pool.counts
            caplog.clear()
            with server.playing(name, times=times):
                if times == 1:
                    run.write()
                    assert server.played == 1
                else:
                    text, seconds = refusal(run.write)
                    longest = max(longest, seconds)
                    assert f"engine 0 ({server.url}): step 5, prompt " in text and "weight" in text, text
            counts = run.pool.counts
            kind = "bad_responses" if name == "no version" else "stale_weights"
            assert counts["reissued"] > before["reissued"] and counts[kind] > before[kind]
            assert f"engine 0 ({server.url}): step 5, prompt " in caplog.text
            if name == "the version of another run":
                assert "another run pushes weights to this server" in caplog.text
                assert "--rollout-engine-urls" in caplog.text
    seen(detect_s=longest)


@pytest.mark.slow
@pytest.mark.fault(number=19)
def test_two_runs_that_push_the_same_version_to_one_server_never_train_on_the_others_tokens():
    """Versions count steps: both runs are at version 1, with weights of their own."""
    with running() as mine:
        (server,) = mine.servers
        other = Run(server)
        try:
            other.student.model, other.student.version = make_hf_model("qwen3", seed=77), mine.student.version
            other.pool.push(other.student.export, other.student.version)
            mine.write()  # given its own weights again
            mine.counted(stale_weights=1)
            rollouts = other.pool.generate(REQUESTS, params(), other.student.version)
            assert check_rollouts(rollouts, REQUESTS, other.student.model, other.student.version) < 1e-5
        finally:
            other.pool.close()


@pytest.mark.slow
@pytest.mark.fault(number=19)
def test_a_server_that_somebody_started_anew_gets_the_weights_before_it_writes():
    with running() as run:
        (server,) = run.servers
        server.restart(seed=5)
        run.write()
        run.counted(stale_weights=1)

        def as_it_writes(value, _numbers):
            server.restart(seed=6)
            return answer(value)

        with server.playing(Play(as_it_writes), times=1):
            run.write(requests_of(3, max_new=4))
            run.write()
        assert run.pool.counts["stale_weights"] >= 2
