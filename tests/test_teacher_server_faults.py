"""Teacher servers that are killed, stopped, silent or answer garbage: scores come from others, or every rank is told."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.loop_thread import LoopThread
from megatron_tropd.teacher.server.fleet import TeacherFleet
from megatron_tropd.types import ScoreRequest
from tests.hf_models import VOCAB_SIZE, make_hf_model, save_hf_checkpoint
from tests.sglang_helpers import needs_sglang, reference_logprobs
from tests.sglang_replies import FakeEngine, Reply, answer, http
from tests.teacher_servers import Fleet, check_scores, model_of, rollouts_to_score, settings_of
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.servers, needs_sglang]


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory) -> Path:
    return save_hf_checkpoint(tmp_path_factory.mktemp("teacher") / "hf", "qwen3")


@pytest.fixture(scope="module")
def teacher_fleet(hf_dir, tmp_path_factory):
    """Two real servers that the fleet starts; a silent one is given up on after 5 s."""
    with Fleet(hf_dir, tmp_path_factory.mktemp("logs"), num_servers=2, request_timeout_s=5.0) as fleet:
        yield fleet.up()


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_server_that_fails_in_the_middle_is_started_anew_and_nothing_is_lost(teacher_fleet, number):
    fleet = teacher_fleet.up().fleet
    before = dict(fleet.counts)
    rollouts = rollouts_to_score(160)
    futures = teacher_fleet.begin(rollouts)
    wait_for(lambda: all(server.requests_in_flight for server in fleet.servers))
    os.killpg(fleet.servers[1].server.pid, number)
    check_scores(rollouts, futures)
    teacher_fleet.up()
    assert fleet.counts["restarts"] == before["restarts"] + 1 and fleet.counts["retries"] > before["retries"]
    assert all(server.is_up and not server.given_up for server in fleet.servers)
    assert all(server.requests_in_flight == server.tokens_in_flight == 0 for server in fleet.servers)
    again = rollouts_to_score(8)
    check_scores(again, teacher_fleet.begin(again))


def test_requested_ids_have_the_models_log_probabilities(teacher_fleet, hf_dir):
    fleet = teacher_fleet.up().fleet
    tokens, ids, start = [3, 9, 20, 4, 7], [0, 11, VOCAB_SIZE - 1], 1
    found = teacher_fleet.loop.run(fleet.ask(5, lambda server: server.logprobs_at(tokens, ids, start)))
    with torch.no_grad():
        expected = make_hf_model("qwen3")(torch.tensor([tokens])).logits[0].log_softmax(-1)[start:-1][:, ids]
    assert found.shape == (3, 3) and (found - expected).abs().max() < 1e-5


def _entries(body, values):
    """Log-probabilities of the tokens from logprob_start_len on."""
    tokens = json.loads(body)["input_ids"][json.loads(body)["logprob_start_len"] :]
    return [
        [None, tokens[0], None],
        *([values(i), 0 if t == VOCAB_SIZE - 1 else t, None] for i, t in enumerate(tokens[1:])),
    ]


def _meta(**fields) -> Reply:
    return answer({"output_ids": [], "meta_info": {"prompt_tokens": 60, **fields}})


def _flat(body, ids):
    import base64

    import numpy as np

    asked = json.loads(body)
    count, k = len(asked["input_ids"]) - asked["logprob_start_len"] - 1, asked["top_logprobs_num"]
    shape = np.broadcast_to(np.asarray(ids(k), dtype=np.int32), (count, k))
    return {
        "input_token_logprobs": _entries(body, lambda _: -1.0),
        "input_top_logprobs_idx_flat_b64": base64.b64encode(np.ascontiguousarray(shape).tobytes()).decode(),
        "input_top_logprobs_val_flat_b64": base64.b64encode(np.full((count, k), -1, np.float32).tobytes()).decode(),
        "input_top_logprobs_idx_flat_b64_dtype": "int32", "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_shape": [count, k], "input_top_logprobs_null_prefix": 1,
    }  # fmt: skip


GARBAGE = {
    "garbage": (lambda body: answer("what"), "has no meta_info"),
    "too few": (lambda body: _meta(input_token_logprobs=_entries(body, lambda _: -1.0)[:9]), "8 log-probabilities for 56"),
    "NaN": (lambda body: _meta(input_token_logprobs=_entries(body, lambda _: float("nan"))), "the number NaN"),
    "null": (lambda body: _meta(input_token_logprobs=_entries(body, lambda _: None)), "is None; expected a finite number"),
    "a foreign id": (lambda body: _meta(**_flat(body, lambda k: [VOCAB_SIZE, *range(k - 1)])), "a top id is 131"),
    "an error": (lambda body: Reply(http(b"oh", "500 Internal Server Error")), "HTTP 500: oh"),
    "silence": (lambda body: Reply(b"", "hang"), "no sign of progress from the server for 0.5 s (--sglang-request-timeout)"),
}  # fmt: skip
"""What a server answers, and what the message says."""


def _teacher_that_answers(reply) -> FakeEngine:
    """A stand-in that passes the checks at the start, and answers scoring with ``reply``."""

    def generate(body: bytes) -> Reply:
        ids = json.loads(body).get("token_ids_logprob")
        if not ids:
            return reply(body)
        return answer({}) if ids[0] < VOCAB_SIZE else Reply(http(b"no such id", "400 Bad Request"))

    return FakeEngine({
        "/model_info": answer({"model_type": "qwen3", "weight_version": "default"}), "/generate": generate,
        "/server_info": answer({"device": "cpu", "dtype": "float32", "tp_size": 1, "max_req_input_len": 200}),
    })  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_an_answer_that_cannot_be_used_is_asked_again_and_then_ends_the_run(hf_dir, tmp_path, kind):
    reply, message = GARBAGE[kind]
    (rollout,) = rollouts_to_score(1)
    options = {"request_timeout_s": 0.5} if kind == "silence" else {}
    with _teacher_that_answers(reply) as server, Fleet(hf_dir, tmp_path, urls=(server.url,), **options) as fleet:
        (future,) = fleet.up().begin([rollout])
        error = future.exception(timeout=120)
        assert isinstance(error, EngineError) and "failed 4 times, at last: " in str(error), error
        assert message in str(error) and f"teacher server 0 ({server.url})" in str(error)
        assert fleet.fleet.counts["retries"] == 3


def test_another_server_is_asked_first(hf_dir, teacher_fleet, tmp_path):
    real = teacher_fleet.up().fleet.servers[0].url
    rollouts = rollouts_to_score(3)
    with (
        _teacher_that_answers(GARBAGE["garbage"][0]) as server,
        Fleet(hf_dir, tmp_path, urls=(server.url, real)) as fleet,
    ):
        check_scores(rollouts, fleet.up().begin(rollouts))
        assert fleet.fleet.counts["retries"] == server.asked.count("/generate") - 2 > 0  # two were checks


def test_servers_that_nobody_answers_at_are_given_up(hf_dir, tmp_path):
    with Fleet(hf_dir, tmp_path, urls=("http://127.0.0.1:9",), start_timeout_s=1.0) as fleet:
        with pytest.raises(EngineError, match=r"no SGLang teacher server is left:\n.*\(--sglang-start-timeout\)"):
            fleet.up()
        (future,) = fleet.begin(rollouts_to_score(1))
        assert "no SGLang teacher server is left" in str(future.exception(timeout=60))


def test_ids_that_only_the_teacher_has_do_not_take_places_in_the_top_k(hf_dir, tmp_path):
    """Of k + 8 ids the first 12 are beyond the common vocabulary: the server is asked for more."""
    asked = []

    def reply(body):
        asked.append(json.loads(body)["top_logprobs_num"])
        return _meta(**_flat(body, lambda k: [*range(VOCAB_SIZE - 12, VOCAB_SIZE), *range(k - 12)]))

    with _teacher_that_answers(reply) as server:
        settings = settings_of(hf_dir, tmp_path, urls=(server.url,))
        model = model_of(hf_dir, common_vocab_size=VOCAB_SIZE - 12)
        loop = LoopThread("test")
        fleet = TeacherFleet(settings, model, owns=True)
        loop.run(fleet.open())
        scores = loop.run(fleet.ask(60, lambda each: each.score(rollouts_to_score(1)[0], 5)))
        loop.run(fleet.close())
        loop.close()
    assert asked == [13, 17] and scores.topk_ids[0].tolist() == [0, 1, 2, 3, 4]


def _one_rank_finds_it_dead(hf_dir, logs):
    """On this rank of two: rank 0 owns a server, and only rank 1 asks it, after it was killed."""
    import torch.distributed as dist

    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.parallel.layout import ParallelLayout
    from megatron_tropd.teacher.scorer import Destination
    from megatron_tropd.teacher.server.scorer import ServerScorer

    scorer = ServerScorer(settings_of(hf_dir, logs), model_of(hf_dir), agreement=1e-4)
    groups = student_groups(ParallelLayout(dp=2))
    try:
        scorer.logprobs_of([[3, 4, 5]], vocab_size=VOCAB_SIZE)
        if dist.get_rank() == 0:
            os.killpg(scorer._fleet.servers[0].server.pid, signal.SIGKILL)
        dist.barrier()
        rollouts, want = rollouts_to_score(3), ScoreRequest(top_k=5)
        if dist.get_rank() == 1:
            scorer.submit(0, dict(enumerate(rollouts)), want)
        destination = Destination(groups=groups, owners=dict.fromkeys(range(3), 0))
        scores = scorer.scores(0, dict(enumerate(rollouts)), want, destination)
        return {index: each.logprob for index, each in scores.items()}, scorer.metrics()
    finally:
        scorer.close()


@pytest.mark.thorough
def test_a_server_that_only_another_rank_finds_dead_is_started_anew(ranks, hf_dir, tmp_path):
    (first, metrics), (second, _) = ranks(2).run(_one_rank_finds_it_dead, hf_dir, tmp_path)
    assert metrics["restarts"] == 1 and metrics["retries"] >= 3 and not second
    model = make_hf_model("qwen3")
    for rollout, logprob in zip(rollouts_to_score(3), first.values(), strict=True):
        expected = reference_logprobs(model, rollout.token_ids)[rollout.prompt_len - 1 :]
        assert (logprob - torch.tensor(expected)).abs().max() < 1e-5
