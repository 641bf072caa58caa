"""Teachers on servers that misbehave in every way that a server can: others score, or the scoring ends soon with an
error that names the server; no score of another request or another model is taken."""

from __future__ import annotations

import contextlib
import time
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.api import client
from megatron_tropd.sglang.api.scores import score_body
from megatron_tropd.teacher.scorer import ScorerError
from megatron_tropd.teacher.server.scorer import ServerScorer
from megatron_tropd.types import ScoreRequest
from tests.faulty_answers import ANOTHER, BROKEN, BUSY, NOT_JSON, NUMBERS, SHAPES, SILENT, Play, reset_after
from tests.faulty_server import FaultyServer
from tests.hf_models import VOCAB_SIZE, make_hf_model, save_hf_checkpoint
from tests.sglang_helpers import reference_logprobs
from tests.sglang_replies import answer
from tests.teacher_servers import Fleet, check_scores, model_of, rollouts_to_score, settings_of
from tests.waiting import wait_for

PATIENCE_S = 30.0
MALFORMED = {**NOT_JSON, **SHAPES, **NUMBERS, **ANOTHER}
TEXTS = [[3, 7, 11, 19, 5]]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Short pauses between attempts: hundreds of answers make the client try again."""
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.002)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    return save_hf_checkpoint(tmp_path_factory.mktemp("teacher") / "hf", "qwen3")


class Teachers:
    """Faulty servers with the teacher's weights, and the fleet that asks them."""

    def __init__(self, hf_dir, logs, servers, **changes) -> None:
        self.servers = servers
        for server in servers:
            server.model = make_hf_model("qwen3")
        options = {"request_timeout_s": PATIENCE_S, "start_timeout_s": PATIENCE_S, **changes}
        self.fleet = Fleet(hf_dir, logs, urls=tuple(server.url for server in servers), **options)

    @property
    def counts(self):
        return dict(self.fleet.fleet.counts)

    def give_up_soon(self) -> None:
        """After half a second of silence, and one of waiting for it to come back."""
        for server in self.fleet.fleet.servers:
            server._settings = replace(server._settings, request_timeout_s=0.5, start_timeout_s=1.0)
            server._watch._silence_s = 0.5

    def score(self, number: int = 1) -> None:
        """All rollouts are scored as transformers' model scores them."""
        rollouts = rollouts_to_score(number, 20)
        check_scores(rollouts, self.fleet.begin(rollouts))

    def refusal(self) -> tuple[str, float]:
        """The error of a rollout, and the seconds until it came."""
        start = time.monotonic()
        future: Future = self.fleet.begin(rollouts_to_score(1, 20))[0]
        error = future.exception(timeout=120)
        assert isinstance(error, EngineError), error
        return str(error), time.monotonic() - start


@contextlib.contextmanager
def teachers(hf_dir, logs, number: int = 1, **changes):
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(FaultyServer(seed)) for seed in range(number)]
        made = Teachers(hf_dir, logs, servers, **changes)
        stack.enter_context(made.fleet)
        made.fleet.up()
        made.score()
        yield made


@pytest.mark.slow
@pytest.mark.fault(number=17)
def test_a_teacher_that_is_busy_or_broken_for_a_while_loses_nothing(hf_dir, tmp_path):
    with teachers(hf_dir, tmp_path) as made:
        (server,) = made.servers
        for name in (*BUSY, *BROKEN):
            if "with Retry-After" not in name:  # tried with engines
                with server.playing(name, times=2):
                    made.score()
                    assert server.played == 2, name
        assert made.counts["restarts"] == made.counts["retries"] == 1, "HTTP 500 is final, and then waited for"


@pytest.mark.slow
@pytest.mark.fault(number=18)
def test_malformed_scores_for_good_end_the_scoring_by_name(hf_dir, tmp_path, seen):
    longest = 0.0
    with teachers(hf_dir, tmp_path) as made:
        (server,) = made.servers
        for name in MALFORMED:
            before = made.counts["retries"]
            with server.playing(name):
                text, seconds = made.refusal()
            longest = max(longest, seconds)
            assert f"failed 4 times, at last: teacher server 0 ({server.url}): prompt 0, sample 0: " in text, (
                name,
                text,
            )
            assert made.counts["retries"] == before + 3 and seconds < 30, name
        made.score()
    seen(detect_s=longest)


@pytest.mark.slow
@pytest.mark.fault(number=22)
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("503", "reset somewhere", "silence") else pytest.mark.thorough)
    for name in (*BUSY, *BROKEN, *SILENT) if "with Retry-After" not in name
])  # fmt: skip
def test_a_teacher_that_is_gone_for_good_ends_the_scoring_by_name(hf_dir, tmp_path, name, seen):
    with teachers(hf_dir, tmp_path) as made:
        (server,) = made.servers
        made.give_up_soon()
        with server.playing(name):
            text, seconds = made.refusal()
        assert f"no SGLang teacher server is left:\nteacher server 0 ({server.url}) did not answer" in text, text
        assert "(--sglang-start-timeout), at last: " in text and seconds < 30
        said = {"429": "busy (HTTP 429)", "503": "busy (HTTP 503)", "500": "HTTP 500: oh"}
        assert said.get(name[:3], "--sglang-request-timeout" if name in SILENT else "Error") in text
        assert made.counts["given_up"] == 1 and made.counts["restarts"] == 1
    seen(detect_s=seconds)


@pytest.mark.slow
@pytest.mark.fault(number=18)
def test_a_malformed_score_is_asked_of_another_teacher(hf_dir, tmp_path, caplog):
    with teachers(hf_dir, tmp_path, 2) as made:
        bad, good = made.servers
        for name in MALFORMED:
            before, asked = made.counts["retries"], good.asked.count("/generate")
            caplog.clear()
            with bad.playing(name):
                made.score(3)
                assert bad.played == made.counts["retries"] - before > 0
                assert good.asked.count("/generate") == asked + 3
            assert f"an answer that cannot be used: teacher server 0 ({bad.url})" in caplog.text
        assert made.counts["restarts"] == made.counts["given_up"] == 0


@pytest.mark.thorough  # the same of engines is in test_faulty_servers.py
@pytest.mark.slow
@pytest.mark.fault(number=18)
def test_a_score_that_is_reset_after_any_byte_is_asked_for_again(hf_dir, tmp_path):
    """Several hundred positions: in the headers, in numbers, in base64."""
    (rollout,) = rollouts_to_score(1, 12)
    with teachers(hf_dir, tmp_path) as made:
        (server,) = made.servers
        (teacher,) = made.fleet.fleet.servers
        run = made.fleet.loop.run
        expected = run(teacher.score(rollout, 5))
        body = score_body(rollout.token_ids, start=rollout.prompt_len - 1, top_k=13)
        value = run(teacher._post("/generate", body, what="test"))
        length = len(answer(value).raw)
        assert length > 1000
        for place in range(0, length, 7):
            with server.playing(
                Play(lambda _value, _numbers, place=place: reset_after(value, place), works=False), times=1
            ):
                found = run(teacher.score(rollout, 5))
                assert server.played == 1
            assert torch.equal(found.logprob, expected.logprob) and torch.equal(found.topk_ids, expected.topk_ids)


@pytest.mark.slow
@pytest.mark.fault(number=22)
def test_a_teacher_that_comes_back_through_a_proxy_is_waited_for(hf_dir, tmp_path):
    """While it is down a proxy answers in its place, with pages; its own first answers break off."""
    with teachers(hf_dir, tmp_path) as made:
        (server,) = made.servers
        for path, play in (("/model_info", "a page"), ("/server_info", "reset somewhere"), ("/generate", "503")):
            with server.playing("500", times=1):  # the fleet takes it for down
                future = made.fleet.begin(rollouts_to_score(1, 20))[0]
                wait_for(lambda: server.played == 1)
                with server.playing(play, path, times=6):
                    wait_for(lambda: server.played >= 1)
                    check_scores(rollouts_to_score(1, 20), [future])
        assert made.counts["given_up"] == 0


@pytest.mark.slow
@pytest.mark.fault(number=21)
@pytest.mark.parametrize("how", ["another model", "a damaged weight", "the same model"])
def test_a_teacher_that_somebody_started_anew_is_known_by_its_scores(hf_dir, tmp_path, how, seen):
    """Its answers are well formed, its type and vocabulary are right: what it scored is not used."""
    rollouts = dict(enumerate(rollouts_to_score(2, 20)))
    with FaultyServer() as server:
        server.model = make_hf_model("qwen3")
        settings = settings_of(hf_dir, tmp_path, urls=(server.url,), request_timeout_s=PATIENCE_S)
        scorer = ServerScorer(settings, model_of(hf_dir), agreement=1e-3)
        try:
            (first,) = scorer.logprobs_of(TEXTS, vocab_size=VOCAB_SIZE)
            assert first == pytest.approx(reference_logprobs(make_hf_model("qwen3"), TEXTS[0]), abs=1e-5)
            scorer.submit(0, rollouts, ScoreRequest())
            scorer._on_rank_zero(lambda: scorer._check_same_model(0))
            server.restart(seed=0 if how == "the same model" else 1)
            if how == "a damaged weight":
                server.model = make_hf_model("qwen3")
                server.model.get_parameter("model.norm.weight").data[5] *= 4
            start = time.monotonic()
            if how == "the same model":
                scorer._on_rank_zero(lambda: scorer._check_same_model(0))
                return
            with pytest.raises(ScorerError) as failure:
                scorer.scores(0, rollouts, ScoreRequest(), None)
            text = str(failure.value)
            assert f"teacher server 0 ({server.url}): after step 1 its log-probabilities of a text differ by" in text
            assert "--parity-limit 0.001" in text and "not used" in text
            seen(detect_s=time.monotonic() - start)
        finally:
            scorer.close()
