"""Whatever a server answers, it is a whole and true answer or an error that is named: never another exception, never
a hang, never another meaning."""

from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.benchmarks.serving import given as models_at
from megatron_tropd.errors import EngineError
from megatron_tropd.rollout.sglang.api.generation import read_samples, read_scores
from megatron_tropd.sglang.api import client
from megatron_tropd.sglang.api.control import (
    check_done,
    read_checksums,
    read_load,
    read_server_info,
    read_weight_version,
)
from megatron_tropd.sglang.errors import BadResponse, EngineDown, RequestRefused, StaleWeights
from megatron_tropd.sglang.server import server as server_module
from tests.sglang_replies import (
    GOOD,
    GROUP,
    MAX_NEW,
    REQUESTS,
    RULES,
    SEEDS,
    STOP,
    VERSION,
    VOCAB_SIZE,
    FakeEngine,
    Reply,
    answer,
    damaged,
    engine_at,
    generate_three,
    good_sample,
    http,
    make_samples,
)

GIVEN = [5, 6, 7, VOCAB_SIZE + 2]
NAMED = (BadResponse, StaleWeights, EngineDown, RequestRefused)


def examples(count: int):
    """Hypothesis without randomness, clocks or files: the same inputs in every run."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None)


def _check_message(error: EngineError, *parts: str) -> None:
    text = str(error)
    text.encode()  # a lone surrogate could not be printed
    assert 10 < len(text) < 2000 and all(part in text for part in parts), text


def _is_number(value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_rollouts(rollouts, body) -> None:
    """The rollouts say what ``body`` says, by an account of their own: equal JSON texts are equal values and types."""
    samples = body if isinstance(body, list) else [body]
    assert len(rollouts) == len(samples) == 3
    for index, sample in enumerate(samples):
        rollout, meta = rollouts[index], sample["meta_info"]
        written = rollout.token_ids[len(GROUP.token_ids) :]
        assert rollout.sample_index == index and rollout.token_ids[: len(GROUP.token_ids)] == GROUP.token_ids
        assert json.dumps(written) == json.dumps(sample["output_ids"])
        assert json.dumps([entry[1] for entry in meta["output_token_logprobs"]]) == json.dumps(written)
        assert all(_is_number(entry[0]) for entry in meta["output_token_logprobs"])
        assert list(rollout.logprobs) == [min(entry[0], 0.0) for entry in meta["output_token_logprobs"]]
        assert all(-3.5e38 < entry[0] <= 1e-3 for entry in meta["output_token_logprobs"])
        assert max(written) < VOCAB_SIZE and min(written) >= 0
        assert json.dumps(meta["prompt_tokens"]) == "4"
        assert meta["weight_version"] == "4" and rollout.weight_version == (4, 4)
        assert {span["version"] for span in meta.get("weight_versions") or []} <= {"4"}
        assert rollout.finish == meta["finish_reason"]["type"]
        assert not set(written[:-1]) & set(STOP), "written beyond the end"
        assert written[-1] in STOP if rollout.finish == "stop" else len(written) == MAX_NEW


# ---- the readers ----


WHOLE = SEEDS.map(lambda seed: make_samples(seed, samples=3, max_new=MAX_NEW))


@examples(200)
@given(WHOLE)
def test_good_samples_are_read_as_they_are(body):
    _check_rollouts(read_samples(body, GROUP, REQUESTS, version=VERSION, rules=RULES), body)


@examples(1800)
@given(WHOLE.flatmap(damaged))
def test_damaged_samples_are_rollouts_or_named_errors(body):
    try:
        rollouts = read_samples(body, GROUP, REQUESTS, version=VERSION, rules=RULES)
    except (BadResponse, StaleWeights) as error:
        _check_message(error)
    else:
        _check_rollouts(rollouts, body)


def _one(token_ids, *, logprob=-1.0, finish="stop"):
    return good_sample(list(token_ids), [logprob] * len(token_ids), finish)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (_one([11, 2], logprob=0.0011), "written token 11 is 0.0011; expected a log-probability"),
        (_one([11, 2], logprob=1e-3), ""),
        (_one([11, 2], logprob=-1e39), "written token 11 is -1e+39"),  # -inf in the trainer's fp32
        (_one([11, 2], logprob=10**400), "finite number"),
        (_one([11, True, 2]), "wrote token id True"),
        (_one([11, 12.0, 2]), "wrote token id 12.0"),
        (_one([11, 10**400, 2]), "wrote token id 1000"),
        (_one([11, 9, 12, 2]), "expected a stop token of [2, 9] at the end and nowhere else"),
        (_one([11, 2, 12, 13, 14], finish="length"), "at the end and nowhere else, or the full length"),
        (_one([11, 12], finish="stop"), "expected a stop token"),
        (_one([11, 2], finish="length"), "after 2 of 5 tokens"),
    ],
)
def test_what_looks_like_a_sample_and_is_none_is_named(sample, message):
    body = [sample, *(_one([11, 2]) for _ in range(2))]
    if not message:
        rollouts = read_samples(body, GROUP, REQUESTS, version=VERSION, rules=RULES)
        assert rollouts[0].logprobs == (0.0, 0.0)
        return
    with pytest.raises(BadResponse) as failure:
        read_samples(body, GROUP, REQUESTS, version=VERSION, rules=RULES)
    _check_message(failure.value, message)


GOOD_SCORES = (
    SEEDS.map(random.Random)
    .map(lambda numbers: [-numbers.expovariate(0.5) for _ in range(3)])
    .map(
        lambda values: {
            "meta_info": {
                "weight_version": "4",
                "prompt_tokens": 4,
                "input_token_logprobs": [
                    [None, 5, None],
                    *([v, t, None] for v, t in zip(values, (6, 7, 0), strict=True)),
                ],
            }
        }
    )
)


def _check_scores(scores, body) -> None:
    _, *entries = body["meta_info"]["input_token_logprobs"]
    assert list(scores) == [min(entry[0], 0.0) for entry in entries] and max(entry[0] for entry in entries) <= 1e-3
    assert all(_is_number(entry[0]) for entry in entries)
    assert json.dumps([entry[1] for entry in entries]) == "[6, 7, 0]" and body["meta_info"]["weight_version"] == "4"


@examples(500)
@given(st.one_of(GOOD_SCORES.flatmap(damaged), GOOD_SCORES))
def test_damaged_scores_are_scores_or_named_errors(body):
    try:
        scores = read_scores(body, GIVEN, version=VERSION, rules=RULES)
    except (BadResponse, StaleWeights) as error:
        _check_message(error)
    else:
        _check_scores(scores, body)


CONTROL = {
    "/server_info": read_server_info, "/model_info": read_weight_version, "/v1/loads": read_load,
    "/end_weight_update": check_done, "/weights_checker": read_checksums,
}  # fmt: skip


def _check_control(path: str, value, body) -> None:
    if path == "/server_info":
        assert (value.tp_size, value.ep_size) == (body["tp_size"], body.get("ep_size", 1))
        assert value.is_cpu == (body["device"] == "cpu") and value.dtype == body["dtype"]
        assert value.max_tokens == body["max_req_input_len"] + 4
        assert {type(body[key]) for key in ("tp_size", "max_req_input_len")} == {int}
    elif path == "/model_info":
        assert value is body["weight_version"] and type(value) is str
    elif path == "/v1/loads":
        assert value.running == sum(entry["num_running_reqs"] for entry in body["loads"])
    else:
        assert body["success"] is True
    if path == "/weights_checker":
        assert value.by_name == {k: v for rank in body["ranks"] for k, v in rank["checksums"].items()}
        assert value.engine == body["per_engine_checksum"] and type(value.engine) is str


@examples(700)
@given(st.sampled_from(sorted(CONTROL)).flatmap(lambda path: st.tuples(st.just(path), damaged(GOOD[path]))))
def test_damaged_control_answers_are_read_or_named_errors(case):
    path, body = case
    try:
        value = CONTROL[path](body)
    except BadResponse as error:
        _check_message(error)
    else:
        _check_control(path, value, body)


@pytest.mark.parametrize("path", sorted(CONTROL))
def test_good_control_answers_are_read(path):
    _check_control(path, CONTROL[path](GOOD[path]), GOOD[path])


@pytest.mark.parametrize(
    "body", [None, [], {}, {"data": 3}, {"data": []}, {"data": [1]}, {"data": [{"id": True}]}, 10**400]
)
def test_a_list_of_models_of_another_shape_names_its_server(body):
    with FakeEngine({"/v1/models": answer(body)}) as server, pytest.raises(BadResponse) as failure:
        models_at((server.url,), None, None)
    _check_message(failure.value, f"--server-urls {server.url}: /v1/models: ")


# ---- the same over HTTP, through the engine ----


@pytest.fixture
def quick(monkeypatch):
    """No pauses between attempts: hundreds of answers make the client try again."""
    monkeypatch.setattr(client, "_FIRST_PAUSE_S", 0.0)


@st.composite
def broken_http(draw, raw: bytes) -> Reply:
    """An HTTP answer that ends early, or lies about its length, its encoding or its status."""
    content = raw.partition(b"\r\n\r\n")[2]
    how = draw(st.sampled_from(["cut", "cut", "status", "header", "chunked", "noise"]))
    then = draw(st.sampled_from(["close", "reset"]))
    if how == "cut":
        return Reply(raw[: draw(st.integers(0, len(raw) - 1))], then)
    if how == "status":
        codes = ["204 x", "301 x", "304 x", "400 x", "404 x", "429 x", "500 x", "503 x", "599 x", "999 x", "abc", "2 0"]
        return Reply(http(content, draw(st.sampled_from(codes)), "location: http://127.0.0.1:1/"))
    if how == "header":
        lines = [
            "content-encoding: gzip", "content-encoding: nonsense", "content-type: application/json; charset=base64",
            "content-length: 3", "transfer-encoding: chunked", "transfer-encoding: gzip", ": x", "\x00: x",
            "content-type: application/json; charset=punycode", "set-cookie: \xff=\xff; expires=never",
        ]  # fmt: skip
        status = draw(st.sampled_from(["200 OK", "404 x"]))
        return Reply(http(content, status, draw(st.sampled_from(lines))), then)
    if how == "chunked":
        size = draw(st.sampled_from([b"-1", b"0", b"g", b"%x" % len(content), b"%x" % (len(content) + 9), b"f" * 40]))
        start = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        return Reply(start + size + b"\r\n" + content + draw(st.sampled_from([b"", b"\r\n0\r\n\r\n"])), then)
    place = draw(st.integers(0, len(raw) - 1))
    return Reply(raw[:place] + draw(st.binary(min_size=1, max_size=4)) + raw[place + 1 :], then)


def _said(reply: Reply):
    """The JSON in a reply, wherever it begins."""
    content = reply.raw.decode(errors="replace")
    return json.JSONDecoder().raw_decode(content, min(i for mark in '{["' if (i := content.find(mark)) >= 0))[0]


@pytest.mark.usefixtures("quick")
@pytest.mark.fault(number=18)
def test_damaged_generations_over_http_are_rollouts_or_name_engine_step_and_prompt():
    replies = st.one_of(
        WHOLE.flatmap(damaged).map(answer),
        WHOLE.map(lambda body: answer(body).raw).flatmap(broken_http),
        WHOLE.map(
            lambda body: answer([{**one, "meta_info": {**one["meta_info"], "weight_version": "3"}} for one in body])
        ),
        WHOLE.map(answer),
    )
    outcomes = []

    @examples(400)
    @given(replies)
    def every(reply):
        server.replies["/generate"] = reply
        try:
            rollouts = run(generate_three(engine))
        except NAMED as error:
            _check_message(error, f"engine 0 ({server.url}): step 5, prompt 0: ")
            outcomes.append(type(error))
        else:
            _check_rollouts(rollouts, _said(reply))
            outcomes.append(dict)

    with FakeEngine() as server, engine_at(server) as (engine, run):
        every()
    assert {dict, BadResponse, StaleWeights, EngineDown} <= set(outcomes)


async def _begin(engine):
    await engine.begin_update()


async def _end(engine):
    await engine.end_update(VERSION, ["model.norm.weight"], {"model.norm.weight": "0123"})


OPERATIONS = {
    "/server_info": lambda engine: engine.wait_until_up(),
    "/model_info": lambda engine: engine.check_health(),
    "/begin_weight_update": _begin,
    "/end_weight_update": _end,
    "/weights_checker": _end,
    "/update_weight_version": lambda engine: engine.set_version(VERSION),
    "/update_weights_from_tensor": lambda engine: engine.call_loader(b"{}", what="planned receive", timeout_s=60.0),
    "/pause_generation": lambda engine: engine.pause("retract"),
}  # fmt: skip
"""Something that an engine does, by the path whose answer is damaged."""

CASES = st.sampled_from(sorted(OPERATIONS)).flatmap(
    lambda path: st.tuples(
        st.just(path),
        st.one_of(
            damaged(GOOD[path]).map(answer), broken_http(answer(GOOD[path]).raw), st.just(answer(GOOD[path])),
        ),
    )
)  # fmt: skip


def _check_believed(path: str, reply: Reply, engine) -> None:
    """What the engine took for good was good."""
    if path == "/pause_generation" or reply.raw.startswith(b"HTTP/1.1 404"):
        return
    body = _said(reply)
    if path == "/server_info":
        assert engine.is_up and (engine.tp_size, engine.max_tokens) == (body["tp_size"], body["max_req_input_len"] + 4)
    elif path == "/model_info":
        assert body["weight_version"] == "4"
    elif path == "/weights_checker":
        held = {k: v for rank in body["ranks"] for k, v in rank["checksums"].items()}
        assert not engine.verified or held == {"model.norm.weight": "0123"}
    else:
        assert body["success"] is True


@pytest.mark.usefixtures("quick")
def test_damaged_control_answers_over_http_are_believed_only_if_they_are_good(monkeypatch):
    monkeypatch.setattr(server_module, "_POLL_S", 0.01)
    believed = set()

    @examples(300)
    @given(CASES)
    def every(case):
        path, reply = case
        server.replies |= {name: answer(value) for name, value in GOOD.items()} | {path: reply}
        try:
            run(OPERATIONS[path](engine))
        except EngineError as error:
            _check_message(error, f"engine 0 ({server.url})")
        else:
            _check_believed(path, reply, engine)
            believed.add(path)
        engine.version = VERSION

    with FakeEngine() as server, engine_at(server, start_timeout_s=0.2) as (engine, run):
        every()
    assert believed == set(OPERATIONS)


def test_an_answer_without_end_fills_no_memory(monkeypatch):
    monkeypatch.setattr(client, "MAX_ANSWER_BYTES", 1 << 20)
    flood = Reply(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 0x8000, "flood")
    message = r"step 5, prompt 0: the answer is longer than 1048576 bytes"
    with (
        FakeEngine({"/generate": flood}) as server, engine_at(server) as (engine, run),
        pytest.raises(BadResponse, match=message),
    ):  # fmt: skip
        run(generate_three(engine))


@pytest.mark.parametrize("body", [[0] * 3_000_000, {"meta_info": {"weight_version": "x" * 10_000_000}}])
def test_a_huge_answer_gives_a_short_message(body):
    with (
        FakeEngine({"/generate": answer(body)}) as server, engine_at(server) as (engine, run),
        pytest.raises(NAMED) as failure,
    ):  # fmt: skip
        run(generate_three(engine))
    _check_message(failure.value, "engine 0", "step 5, prompt 0")
