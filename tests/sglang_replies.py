"""A fake engine on a real socket, and damaged answers for it: for tests of what a server's answers can do to the client.

The fake is no stand-in for SGLang where that can be run (``sglang_helpers.py``): it answers what SGLang never would.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import random
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from megatron_tropd.models.hf_config import architecture_from_hf_config
from megatron_tropd.rollout.sglang.api.generation import TokenRules, group_requests
from megatron_tropd.rollout.sglang.engine import Engine
from megatron_tropd.sglang.settings import SGLangSettings
from tests.hf_models import SIZES, VARIANTS
from tests.sglang_helpers import params, requests_of

VERSION = 4
VOCAB_SIZE = 50
STOP = (2, 9)


def deep(depth: int) -> list:
    """A list in a list in a list, and so on."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


JUNK = st.one_of(
    st.sampled_from([
        None, True, False, 0, 1, -1, 3, VOCAB_SIZE, 2**53 + 1, 10**400, 0.0, 0.5, -0.5, 7.0, 1e308, float("nan"),
        float("inf"), float("-inf"), "", "x", "4", "5", "NaN", "length", "stop", "abort", "\ud800", "x" * 3000,
    ]),
    st.builds(list), st.builds(dict), st.builds(deep, st.sampled_from([1, 900, 3000])), st.builds(lambda: [7] * 300),
    st.sampled_from(["type", "version", "success"]).flatmap(lambda key: st.builds(lambda: {key: "stop"})),
)  # fmt: skip
"""Values that are put in the place of others."""


def good_sample(tokens: list[int], logprobs: list[float], finish: str) -> dict[str, Any]:
    """What /generate answers for one sample."""
    return {
        "output_ids": tokens,
        "meta_info": {
            "finish_reason": {"type": finish, "matched": tokens[-1]},
            "weight_version": str(VERSION),
            "weight_versions": [{"version": str(VERSION), "start": 0, "end": len(tokens)}],
            "prompt_tokens": 4,
            "output_token_logprobs": [[v, t, None] for v, t in zip(logprobs, tokens, strict=True)],
        },
    }


def make_samples(seed: int, *, samples: int, max_new: int) -> list[dict[str, Any]]:
    """Valid answers for ``samples`` samples of at most ``max_new`` tokens.  Not drawn by hypothesis, which is to look
    for damages: a draw for each token would take most of the time."""
    numbers = random.Random(seed)
    answers = []
    for _ in range(samples):
        length = numbers.randint(1, max_new)
        tokens = numbers.choices(range(10, VOCAB_SIZE), k=length)
        if ended := length < max_new or numbers.random() < 0.5:
            tokens[-1] = numbers.choice(STOP)
        logprobs = [-numbers.expovariate(0.5) for _ in tokens]
        answers.append(good_sample(tokens, logprobs, "stop" if ended else "length"))
    return answers


SEEDS = st.integers(0, 1 << 20)


def _places(value: Any, path: tuple = ()) -> list[tuple]:
    places = [path] if path else []
    children = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, child in children[:40] if len(path) < 7 else ():
        places += _places(child, (*path, key))
    return places


@st.composite
def damaged(draw, value: Any) -> Any:
    """A copy of ``value`` in which one to three places are replaced, removed, doubled or changed a little."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(value)
        if not places or draw(st.integers(0, 20)) == 0:
            return draw(JUNK)
        *parents, last = draw(st.sampled_from(places))
        holder = value
        for key in parents:
            holder = holder[key]
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "nudge"]))
        if how == "replace":
            holder[last] = draw(JUNK)
        elif how == "remove":
            del holder[last]
        elif how == "double" and isinstance(holder, list):
            holder.insert(last, copy.copy(holder[last]))
        elif type(holder[last]) in (int, float):
            holder[last] += draw(st.sampled_from([1, -1, 0.5, 100]))
    return value


@dataclass(frozen=True, slots=True)
class Reply:
    """Bytes of an answer, and what happens after them."""

    raw: bytes
    then: str = "close"
    """close or reset the connection, hang, drip: send a byte now and then, or flood: send the same for ever."""


def http(content: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(content)}", "connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + content


def answer(value: Any) -> Reply:
    """``value`` as a good HTTP answer; what JSON does not have is written as Python writes it (NaN)."""
    return Reply(http(_json(value)))


def _json(value: Any) -> bytes:
    with contextlib.suppress(RecursionError):
        return json.dumps(value).encode()
    return b"[" * 100_000 + b"]" * 100_000


IDLE = {"loads": [{"timestamp": 1.0, "num_running_reqs": 0, "num_waiting_reqs": 0}]}

GOOD: dict[str, Any] = {
    "/model_info": {"weight_version": str(VERSION)},
    "/server_info": {"device": "cpu", "dtype": "float32", "tp_size": 1, "ep_size": 1, "max_req_input_len": 96},
    "/v1/loads": IDLE,
    "/pause_generation": {"status": "ok"},
    "/continue_generation": {"status": "ok"},
    "/begin_weight_update": {"success": True, "message": "Success"},
    "/end_weight_update": {"success": True, "message": "Success"},
    "/update_weights_from_tensor": {"success": True, "message": "Success"},
    "/update_weight_version": {"success": True, "message": "ok", "new_version": "4"},
    "/weights_checker": {
        "success": True, "message": "Success", "per_engine_checksum": "ab",
        "ranks": [{"checksums": {"model.norm.weight": "0123"}, "per_gpu_checksum": "ab"}],
    },
}  # fmt: skip
"""Good answers by path."""


class FakeEngine(socketserver.ThreadingTCPServer):
    """Answers each path with a reply, or with what a function of the request's body returns."""

    daemon_threads = allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, replies: dict[str, Reply | Callable[[bytes], Reply]] | None = None) -> None:
        self.replies: dict[str, Any] = {**{path: answer(value) for path, value in GOOD.items()}, **(replies or {})}
        self.asked: list[str] = []
        self.closing = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_) -> None:
        """A client that went away is what some tests are about."""


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        path = self.rfile.readline().split()[1].decode().partition("?")[0]
        length = 0
        while (line := self.rfile.readline().strip().lower()) != b"":
            if line.startswith(b"content-length:"):
                length = int(line.partition(b":")[2])
        body = self.rfile.read(length)
        self.server.asked.append(path)
        reply = self.server.replies[path]
        reply = reply(body) if callable(reply) else reply
        if reply.then == "drip":
            for byte in reply.raw:
                self.connection.sendall(bytes((byte,)))
                if self.server.closing.wait(0.1):
                    return
        self.connection.sendall(b"" if reply.then == "drip" else reply.raw)
        if reply.then == "hang":
            self.server.closing.wait()
        elif reply.then == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif reply.then == "flood":
            while not self.server.closing.is_set():
                self.connection.sendall(reply.raw)


# ---- a real engine at a fake server ----

ARCH = architecture_from_hf_config({"model_type": "qwen3", **SIZES, **VARIANTS["qwen3"]})
MAX_NEW = 5
RULES = TokenRules(stop_token_ids=frozenset(STOP), vocab_size=VOCAB_SIZE, model_vocab_size=VOCAB_SIZE + 3)
REQUESTS = requests_of(1, samples=3, max_new=MAX_NEW)
(GROUP,) = group_requests(REQUESTS)


@contextlib.contextmanager
def engine_at(server: FakeEngine, **changes):
    """A real Engine on the fake server, and a function that runs its coroutines."""
    options = {"request_timeout_s": 60.0, "start_timeout_s": 60.0, "dtype": "float32", **changes}
    engine = Engine(
        0, SGLangSettings(hf_dir=Path(), log_dir=Path(), urls=(server.url,), **options), ARCH, None, server.url
    )
    with asyncio.Runner() as runner:
        runner.run(engine.start())
        engine.version = VERSION
        yield engine, runner.run
        runner.run(engine.close())


async def generate_three(engine):
    return await engine.generate(GROUP, REQUESTS, params(), VERSION, RULES)
