"""What goes to a server and what may come back, without a server: requests, checks, retries, settings."""

from __future__ import annotations

import asyncio
import copy
import http.server
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd.rollout.sglang.api.generation import (
    TokenRules,
    generate_body,
    group_requests,
    read_samples,
    read_scores,
)
from megatron_tropd.sglang.api.client import Client
from megatron_tropd.sglang.errors import BadResponse, EngineDown, EngineTimeout, RequestRefused, StaleWeights
from megatron_tropd.sglang.server.command import server_arguments, server_environment
from megatron_tropd.sglang.settings import Keys, SGLangSettings, load_keys
from tests.sglang_helpers import params, requests_of

KEYS = Keys(api="a" * 16 + "pi", admin="a" * 16 + "dmin")
RULES = TokenRules(stop_token_ids=frozenset({2, 9}), vocab_size=50, model_vocab_size=53)

# ---- requests and responses ----


def test_requests_that_differ_in_the_sample_are_one_call():
    requests = requests_of(3, samples=2, max_new=5)
    requests[5] = replace(requests[5], max_new_tokens=7)
    requests.append(replace(requests[0], sample_index=9, max_new_tokens=0))
    groups = group_requests(requests)
    assert [group.indices for group in groups] == [(5,), (0, 1), (2, 3), (4,)], "the longest first; none without room"
    body = generate_body(groups[1], params(temperature=0.5, top_p=0.9), RULES)
    assert body["input_ids"] == list(requests[0].token_ids) and body["return_logprob"] is True
    bans = body["sampling_params"].pop("logit_bias")
    assert body["sampling_params"] == {
        "n": 2, "max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "stop_token_ids": [2, 9],
    }  # fmt: skip
    assert bans == {"50": -1e9, "51": -1e9, "52": -1e9}
    assert "logit_bias" not in generate_body(groups[1], params(), replace(RULES, vocab_size=53))["sampling_params"]


def _answer(tokens=(7, 8, 9), finish=None, version="4"):
    return {
        "output_ids": list(tokens),
        "meta_info": {
            "prompt_tokens": 4,
            "finish_reason": finish or {"type": "stop", "matched": tokens[-1]},
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(tokens)}],
            "output_token_logprobs": [[-0.5 - i, token, None] for i, token in enumerate(tokens)],
        },
    }


def _read(answer):
    requests = requests_of(1, max_new=3)
    (group,) = group_requests(requests)
    return read_samples(answer, group, requests, version=4, rules=RULES)[0]


def test_a_good_answer_becomes_a_rollout():
    rollout = _read(_answer())
    assert rollout.token_ids[-3:] == (7, 8, 9) and rollout.logprobs == (-0.5, -1.5, -2.5)
    assert rollout.finish == "stop" and rollout.weight_version == (4, 4)
    assert _read([_answer((7, 8, 6), {"type": "length", "length": 3})]).finish == "length"


def _set(answer, path, value):
    *parents, last = path
    for key in parents:
        answer = answer[key]
    answer[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("output_ids", 1), 50, "outside"),
        (("output_ids", 1), -1, "outside"),
        (("output_ids", 1), "8", "outside"),
        (("output_ids",), [], "1 to 3"),
        (("output_ids",), [7, 7, 7, 9], "1 to 3"),
        (("output_ids",), None, "1 to 3"),
        (("meta_info", "output_token_logprobs"), [[-0.5, 7, None]], "1 log-probabilities for 3"),
        (("meta_info", "output_token_logprobs"), None, "no log-probabilities for 3"),
        (("meta_info", "output_token_logprobs", 2, 0), float("nan"), "is nan"),
        (("meta_info", "output_token_logprobs", 2, 0), float("-inf"), "is -inf"),
        (("meta_info", "output_token_logprobs", 2, 0), None, "is None"),
        (("meta_info", "output_token_logprobs", 2, 1), 6, "does not belong"),
        (("meta_info", "output_token_logprobs", 2), -0.5, "does not belong"),
        (("meta_info", "finish_reason"), {"type": "abort", "message": "Aborted"}, "abort"),
        (("meta_info", "finish_reason"), None, "finish_reason.type"),
        (("meta_info", "weight_versions"), {"version": "4"}, "expected a list"),
        (("meta_info", "weight_versions"), ["4"], "no version"),
        (("meta_info",), None, "no meta_info.prompt_tokens"),
        (("meta_info", "prompt_tokens"), 5, "an answer to 5 tokens; 4 were given"),
        (("prompt_token_ids",), [3, 4, 5, 6], r"an answer to \[3, 4, 5, 6\]; given were"),
    ],
)
def test_what_is_no_rollout_is_a_typed_error(path, value, message):
    answer = _answer()
    _set(answer, path, value)
    with pytest.raises(BadResponse, match=message):
        _read(answer)


def test_a_response_that_ends_early_for_no_reason_is_refused():
    """SGLang shortens what it has no room for, and calls that finished by length."""
    short = _answer((7, 8), {"type": "length", "length": 2})
    with pytest.raises(BadResponse, match=r"after 2 of 3 tokens"):
        _read(short)
    with pytest.raises(BadResponse, match=r"expected a stop token of \[2, 9\]"):
        _read(_answer((7, 8), {"type": "stop", "matched": 8}))


@pytest.mark.parametrize("answer", [[], [_answer(), _answer()], "x", None, {"text": "hello"}])
def test_answers_of_another_kind_are_refused(answer):
    with pytest.raises(BadResponse):
        _read(answer)


@pytest.mark.fault(number=19)
def test_other_weights_are_stale():
    for version in ("3", "default", "None"):
        with pytest.raises(StaleWeights, match="pushed 4"):
            _read(_answer(version=version))
    mixed = _answer()
    mixed["meta_info"]["weight_versions"].append({"version": "3", "start": 0, "end": 1})
    with pytest.raises(StaleWeights, match="'3', '4'"):
        _read(mixed)


def test_scores_skip_the_first_token_and_know_how_the_last_id_is_called():
    entries = [[None, 5, None], [-1.0, 6, None], [-2.0, 0, None]]
    body = {"meta_info": {"weight_version": "4", "prompt_tokens": 3, "input_token_logprobs": entries}}
    assert read_scores(body, [5, 6, 52], version=4, rules=RULES) == (-1.0, -2.0)
    with pytest.raises(BadResponse, match="does not belong"):
        read_scores(body, [5, 6, 51], version=4, rules=RULES)
    wrong = copy.deepcopy(body)
    wrong["meta_info"]["input_token_logprobs"].pop()
    with pytest.raises(BadResponse, match="1 log-prob"):
        read_scores(wrong, [5, 6, 52], version=4, rules=RULES)


# ---- HTTP ----


class _Server(http.server.ThreadingHTTPServer):
    """Answers with a list of (status, body), the last for ever; remembers what it was asked."""

    daemon_threads = True

    def __init__(self, *answers) -> None:
        self.answers, self.asked = list(answers), []
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append(self.headers["authorization"])
        answers = self.server.answers
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        if status == "hang":
            threading.Event().wait(5)
        elif status == "drop":
            self.connection.close()
            return
        self.send_response(status if isinstance(status, int) else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def _post(server_or_url, *, timeout_s=20.0, keys=KEYS, **options):
    url = server_or_url if isinstance(server_or_url, str) else server_or_url.url

    async def work():
        client = Client("engine 7", url, keys)
        try:
            return await client.post("/x", {}, what="step 3, prompt 11", timeout_s=timeout_s, **options)
        finally:
            await client.close()

    try:
        return asyncio.run(work())
    finally:
        if not isinstance(server_or_url, str):
            server_or_url.shutdown()


@pytest.mark.slow
@pytest.mark.fault(number=17)
def test_busy_servers_are_asked_again():
    server = _Server((503, b""), (429, b""), (200, b'{"a": 1}'))
    assert _post(server) == {"a": 1} and len(server.asked) == 3
    busy = _Server((503, b""))
    with pytest.raises(EngineDown, match=r"engine 7: step 3, prompt 11: busy .HTTP 503"):
        _post(busy)
    assert len(busy.asked) == 5


@pytest.mark.parametrize("status", [400, 401, 404, 422])
@pytest.mark.fault(number=17)
def test_refusals_are_final_and_say_why(status):
    server = _Server((status, b'{"error": {"message": "too long"}}'))
    with pytest.raises(RequestRefused, match=f"engine 7: step 3, prompt 11: HTTP {status}: .*too long"):
        _post(server)
    assert len(server.asked) == 1


def test_broken_connections_are_repeated_only_where_that_does_no_harm():
    server = _Server(("drop", b""), (200, b"[]"))
    assert _post(server, repeatable=True) == [] and len(server.asked) == 2
    server = _Server(("drop", b""), (200, b"[]"))
    with pytest.raises(EngineDown):
        _post(server)
    assert len(server.asked) == 1


@pytest.mark.slow
def test_deadlines_bad_json_and_nobody_there():
    with pytest.raises(EngineTimeout, match=r"no answer within 0.3 s"):
        _post(_Server(("hang", b"{}")), timeout_s=0.3)
    with pytest.raises(BadResponse, match="not JSON"):
        _post(_Server((200, b"{")))
    with pytest.raises(EngineDown, match="HTTP 500"):
        _post(_Server((500, b"oops")))
    with pytest.raises(EngineDown, match="prompt 11"):
        _post("http://127.0.0.1:9")


def test_each_request_carries_the_key_it_needs():
    for options, key in [({}, KEYS.admin), ({"admin": False}, KEYS.api)]:
        server = _Server((200, b""))
        _post(server, **options)
        assert server.asked == [f"Bearer {key}"]
    server = _Server((200, b""))
    _post(server, keys=None)
    assert server.asked == [None]


# ---- settings ----


@pytest.fixture
def settings(tmp_path):
    return SGLangSettings(hf_dir=tmp_path, log_dir=tmp_path, dtype="float32", urls=("http://127.0.0.1:1",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urls": (), "python": Path("/no/python")}, "make sglang-env"),
        ({"urls": ("http://10.0.0.7:30000",)}, r"10.0.0.7 can be reached.*TROPD_SGLANG_API_KEY"),
        ({"urls": (), "host": "0.0.0.0", "python": Path(__file__)}, r"0.0.0.0 can be reached"),
        ({"flags": ("--api-key", "x")}, r"--api-key cannot be passed.*TROPD_SGLANG_API_KEY"),
        ({"flags": ("--host=0.0.0.0",)}, r"--host cannot be passed"),
        ({"flags": ("--trust-remote-code",)}, "never run"),
        ({"flags": ("--enable-deterministic-inference",)}, "same random numbers"),
        ({"flags": ("--dtype", "half")}, r"--dtype cannot be passed.*trainer's"),
        ({"flags": ("--pp-size=2",)}, r"--pp-size cannot be passed.*pipeline"),
        ({"flags": ("--dp-size", "2")}, r"--dp-size cannot be passed.*--rollout-num-engines"),
        ({"flags": ("--quantization", "fp8")}, r"--quantization cannot be passed"),
        ({"flags": ("--custom-weight-loader", "x.y")}, r"--custom-weight-loader cannot.*planned sets it"),
        ({"urls": ("127.0.0.1:30000",)}, r"127.0.0.1:30000: expected http://host:port"),
        ({"urls": ("http://127.0.0.1:x",)}, r"expected http://host:port"),
        ({"urls": ("http://127.0.0.1",)}, r"expected http://host:port"),
        ({"num_servers": 0}, "at least 1"),
        ({"num_servers": 2, "tp_size": 2, "gpu_ids": (0, 1, 2)}, "3 GPU ids .*for 2 engines .*of 2"),
    ],
)
@pytest.mark.fault(number=31)
def test_settings_that_cannot_be_are_refused(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(settings, **changes)


def test_public_addresses_are_fine_with_keys_and_never_show_them(settings):
    public = replace(settings, urls=("http://10.0.0.7:30000",), keys=KEYS)
    assert KEYS.api not in repr(public) and KEYS.admin not in repr(public)
    started = replace(settings, urls=(), host="0.0.0.0", python=Path(__file__), keys=KEYS)
    everything = repr(
        (server_arguments(started, 0, 1, 2), server_environment(started, 0, {"TROPD_SGLANG_API_KEY": KEYS.api}))
    )
    assert KEYS.api not in everything and KEYS.admin not in everything


def test_keys_come_from_the_environment_or_a_private_file(tmp_path):
    assert load_keys({}) is None
    pair = {"TROPD_SGLANG_API_KEY": KEYS.api, "TROPD_SGLANG_ADMIN_API_KEY": KEYS.admin}
    assert load_keys(pair) == KEYS
    with pytest.raises(ValueError, match="both keys"):
        load_keys({"TROPD_SGLANG_API_KEY": KEYS.api})
    with pytest.raises(ValueError, match="differ"):
        load_keys({**pair, "TROPD_SGLANG_ADMIN_API_KEY": KEYS.api})
    file = tmp_path / "keys.yaml"
    file.write_text(f"api-key: {KEYS.api}\nadmin-api-key: {KEYS.admin}\n")
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        load_keys({}, file)
    file.chmod(0o600)
    assert load_keys({}, file) == KEYS


def test_flags_of_the_user_replace_defaults(settings):
    ours = server_arguments(settings, 0, 4000, 128)
    assert ours[ours.index("--attention-backend") + 1] == "torch_native"
    assert ours[ours.index("--context-length") + 1] == "136"
    theirs = server_arguments(replace(settings, flags=("--max-total-tokens=99", "--log-level", "error")), 0, 4000, 128)
    assert "--max-total-tokens" not in theirs and theirs[-3:] == ["--max-total-tokens=99", "--log-level", "error"]


def test_the_trainers_environment_stays_with_the_trainer(settings):
    environ = {"RANK": "1", "MASTER_PORT": "2", "PYTHONPATH": "x", "TORCHELASTIC_RUN_ID": "y", "HOME": "/h"}
    on_cpu = server_environment(settings, 0, environ)
    assert on_cpu["HOME"] == "/h" and not on_cpu.keys() & {"RANK", "MASTER_PORT", "PYTHONPATH", "TORCHELASTIC_RUN_ID"}
    assert on_cpu["SGLANG_USE_CPU_ENGINE"] == "1"


def test_a_server_sees_the_trainers_gpus_unless_its_own_are_scattered(settings):
    """A handle of shared memory names the trainer's GPU.  (Not run on a GPU.)"""
    environ = {"CUDA_VISIBLE_DEVICES": "8,9,10,11,12,13,14,15"}
    in_order = replace(settings, cuda=True, tp_size=2, num_servers=2)
    picked = replace(in_order, gpu_ids=(4, 5, 6, 7))
    for changed, index, base in ((in_order, 1, "2"), (picked, 0, "4")):
        ours = server_arguments(changed, index, 4000, 128)
        assert ours[ours.index("--base-gpu-id") + 1] == base
        assert server_environment(changed, index, environ) == server_environment(changed, 0, environ)
        assert server_environment(changed, index, environ)["CUDA_VISIBLE_DEVICES"] == environ["CUDA_VISIBLE_DEVICES"]
        assert "SGLANG_USE_CPU_ENGINE" not in server_environment(changed, index, environ)
    scattered = replace(in_order, gpu_ids=(0, 2, 4, 5))
    assert "--base-gpu-id" not in server_arguments(scattered, 0, 4000, 128)
    assert server_environment(scattered, 0, environ)["CUDA_VISIBLE_DEVICES"] == "8,10"
    assert server_environment(scattered, 0, {})["CUDA_VISIBLE_DEVICES"] == "0,2"
    with pytest.raises(ValueError, match="use --update-weight-transport bytes"):
        replace(scattered, transport="shared")
