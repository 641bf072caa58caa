"""An SGLang server in miniature that misbehaves as it is told: it takes weights, writes and scores with them over HTTP.

It is no stand-in for SGLang where that can be run (``sglang_helpers.py``): it does what SGLang does only in trouble.
``test_faulty_servers.py`` compares what it does when it is told nothing with a real server.
"""

from __future__ import annotations

import base64
import json
import pickle
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_tropd.rollout.sglang.api.checksums import SentChecksums
from tests.faulty_answers import PLAYS, Play
from tests.hf_models import VOCAB_SIZE, make_hf_model
from tests.sglang_replies import FakeEngine, Reply, answer, http

MAX_INPUT = 250
OK = {"success": True, "message": "Success"}
_INT, _FLOAT = np.dtype("int32"), np.dtype("float32")


@dataclass(slots=True)
class _Cast:
    """A play that is on."""

    play: Play
    path: str
    left: int
    """Answers that it still spoils."""
    skip: int
    """Answers that are good before."""


class FaultyServer(FakeEngine):
    """Speaks the endpoints that the run uses of an SGLang server on a CPU.  ``mishandle`` says what becomes of an update:

    "" (it is taken), "nothing" (no tensor is), "half" (the first buckets are), "swapped" (two tensors of one shape in
    each other's place), "a bit" (of one number), "no version" (taken, under the old version).
    ``checker`` says what it hashes: "held" weights, or those that were "sent", or nothing ("absent").
    """

    def __init__(self, seed: int = 0, **model: Any) -> None:
        self._model = model
        self.numbers = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.mishandle, self.checker = "", "held"
        self.played = 0
        """Answers that were spoiled."""
        self.spoils_first: tuple[str, ...] = ()
        """Plays of which one, drawn anew each time, is in the place of the first answer to every prompt."""
        self._seen: set[tuple[int, ...]] = set()
        self._cast: _Cast | None = None
        self._lock, self._casting = threading.RLock(), threading.Lock()
        self._paused = self._in_session = False
        self._running, self._work, self._buckets = 0, 0, 0
        self._sent: dict[str, torch.Tensor] = {}
        self.restart(seed=99)
        paths: dict[str, Callable[[Any], Any]] = {
            "/model_info": lambda _: {"model_type": "qwen3", "weight_version": self.version},
            "/server_info": lambda _: {
                "device": "cpu", "dtype": "float32", "tp_size": 1, "ep_size": 1, "max_req_input_len": MAX_INPUT,
            },
            "/v1/loads": self._loads, "/generate": self._generate, "/pause_generation": self._pause,
            "/continue_generation": self._continue, "/abort_request": lambda _: None,
            "/begin_weight_update": self._begin, "/end_weight_update": self._end,
            "/update_weights_from_tensor": self._take, "/update_weight_version": self._rename,
            "/weights_checker": self._hash,
        }  # fmt: skip
        super().__init__({path: self._answering(path, do) for path, do in paths.items()})

    # ---- what a test does with it ----

    @contextmanager
    def playing(
        self, play: str | Play, path: str = "/generate", *, times: int = 10**9, skip: int = 0
    ) -> Iterator[None]:
        """Spoil so many answers of ``path`` (all of them), after ``skip`` good ones, until the block ends."""
        with self._casting:
            self._cast = _Cast(PLAYS[play] if isinstance(play, str) else play, path, times, skip)
            self.played = 0
        yield
        self._cast = None

    def restart(self, *, seed: int) -> None:
        """As somebody else would: other weights, which nobody pushed."""
        with self._lock:
            self.model, self.version = make_hf_model("qwen3", seed=seed, **self._model), "default"
            self._paused = self._in_session = False

    # ---- what it does ----

    def _answering(self, path: str, do: Callable[[Any], Any]) -> Callable[[bytes], Reply]:
        def reply(body: bytes) -> Reply:
            play = self._next_play(path)
            if play is not None and not play.works:
                return play.reply(None, self.numbers)
            asked = json.loads(body) if body else None
            value = do(asked)
            if isinstance(value, Reply):
                return value
            if path == "/generate" and isinstance(value, list) and self._is_new(asked["input_ids"]):
                play = PLAYS[self.numbers.choice(self.spoils_first)]
            return answer(value) if play is None else play.reply(value, self.numbers)

        return reply

    def _is_new(self, tokens: list[int]) -> bool:
        """Whether an answer to this prompt is to be spoiled, because none was."""
        with self._casting:
            if not self.spoils_first or tuple(tokens) in self._seen:
                return False
            self._seen.add(tuple(tokens))
            self.played += 1
            return True

    def _next_play(self, path: str) -> Play | None:
        with self._casting:
            cast = self._cast
            if cast is None or cast.path != path or cast.left <= 0:
                return None
            if cast.skip:
                cast.skip -= 1
                return None
            cast.left -= 1
            self.played += 1
            return cast.play

    def _loads(self, _body: Any) -> Any:
        return {"loads": [{
            "timestamp": float(self._work), "num_running_reqs": self._running, "num_waiting_reqs": 0,
            "total_prefill_uncached_tokens": self._work,
        }]}  # fmt: skip

    def _generate(self, body: Any) -> Any:
        asked, tokens = body["sampling_params"], body["input_ids"]
        if any(not 0 <= token < VOCAB_SIZE for token in (*tokens, *body.get("token_ids_logprob", ()))):
            return Reply(http(b'{"error": {"message": "an id is out of range"}}', "400 Bad Request"))
        while self._paused and not self.closing.wait(0.01):
            pass
        with self._lock, torch.no_grad():
            self._running += 1
            try:
                return self._score(body) if asked["max_new_tokens"] == 0 else self._write(body)
            finally:
                self._running -= 1

    def _meta(self, tokens: list[int]) -> dict[str, Any]:
        return {"id": uuid.uuid4().hex, "prompt_tokens": len(tokens), "weight_version": self.version}

    def _score(self, body: Any) -> Any:
        tokens, start = body["input_ids"], body["logprob_start_len"]
        table = torch.log_softmax(self.model(torch.tensor([tokens])).logits[0].double(), -1)[start:-1]
        self._work += len(tokens)
        rest = tokens[start + 1 :]
        named = [0 if token == VOCAB_SIZE - 1 else token for token in rest]
        meta = self._meta(tokens) | {"input_token_logprobs": [
            [None, tokens[start], None],
            *([float(row[token]), name, None] for row, token, name in zip(table, rest, named, strict=True)),
        ]}  # fmt: skip
        if top_k := body.get("top_logprobs_num"):
            values, ids = table.topk(top_k, dim=1)
            for part, found, dtype in (("idx", ids, _INT), ("val", values, _FLOAT)):
                data = np.ascontiguousarray(found.numpy().astype(dtype)).tobytes()
                meta[f"input_top_logprobs_{part}_flat_b64"] = base64.b64encode(data).decode()
                meta[f"input_top_logprobs_{part}_flat_b64_dtype"] = dtype.name
            meta |= {"input_top_logprobs_shape": list(ids.shape), "input_top_logprobs_null_prefix": 1}
        if ids_asked := body.get("token_ids_logprob"):
            at = [[[float(row[token]), token, None] for token in ids_asked] for row in table]
            meta["input_token_ids_logprobs"] = [None, *at]
        return {"output_ids": [], "meta_info": meta, "prompt_token_ids": tokens}

    def _write(self, body: Any) -> Any:
        asked, tokens = body["sampling_params"], body["input_ids"]
        number, most = asked.get("n", 1), asked["max_new_tokens"]
        bias = torch.zeros(VOCAB_SIZE, dtype=torch.float64)
        for token, value in asked.get("logit_bias", {}).items():
            bias[int(token)] = value
        ids, entries = torch.tensor([tokens] * number), [[] for _ in range(number)]
        for _ in range(most):
            logits = self.model(ids).logits[:, -1].double() + bias
            logprobs = torch.log_softmax(logits / (asked["temperature"] or 1.0), -1)
            drawn = logprobs.exp().multinomial(1, generator=self.generator)
            drawn = drawn if asked["temperature"] else logprobs.argmax(-1, keepdim=True)
            ids = torch.cat([ids, drawn], dim=1)
            for sample, row, token in zip(entries, logprobs, drawn[:, 0].tolist(), strict=True):
                sample.append([float(row[token]), token, None])
            self._work += 1
        samples = [self._sample(tokens, sample, asked["stop_token_ids"]) for sample in entries]
        return samples if number > 1 else samples[0]

    def _sample(self, tokens: list[int], entries: list[Any], stop: list[int]) -> Any:
        """The answer of one sample, which ends with the first stop token."""
        ends = [place for place, (_, token, _) in enumerate(entries) if token in stop]
        finish: dict[str, Any] = {"type": "length", "length": len(entries)}
        if ends:
            entries = entries[: ends[0] + 1]
            finish = {"type": "stop", "matched": entries[-1][1]}
        meta = self._meta(tokens) | {
            "finish_reason": finish, "completion_tokens": len(entries), "output_token_logprobs": entries,
            "weight_versions": [{"version": self.version, "start": 0, "end": len(entries)}],
        }  # fmt: skip
        return {"output_ids": [token for _, token, _ in entries], "meta_info": meta, "prompt_token_ids": tokens}

    # ---- its weights ----

    def _pause(self, _body: Any) -> Any:
        self._paused = True
        return {"status": "ok"}

    def _continue(self, _body: Any) -> Any:
        self._paused = False
        return {"status": "ok"}

    def _begin(self, _body: Any) -> Any:
        if self._in_session:
            return Reply(http(b'{"success": false, "message": "a session is open"}', "400 Bad Request"))
        self._in_session, self._buckets, self._sent = True, 0, {}
        return OK

    def _end(self, _body: Any) -> Any:
        self._in_session = False
        return OK

    def _take(self, body: Any) -> Any:
        with self._lock:
            tensors = _tensors(base64.b64decode(body["serialized_named_tensors"][0]))
            self._sent |= tensors
            self._buckets += 1
            taken = {} if self.mishandle == "nothing" or (self.mishandle == "half" and self._buckets > 2) else tensors
            held = self.model.state_dict()
            with torch.no_grad():
                for name in taken.keys() & held.keys():
                    held[name].copy_(taken[name])
                if body["weight_version"] is not None:
                    _spoil(held, self.mishandle)
            if body["weight_version"] is not None and self.mishandle != "no version":
                self.version = body["weight_version"]
        return OK

    def _rename(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {**OK, "new_version": self.version}

    def _hash(self, _body: Any) -> Any:
        if self.checker == "absent":
            return Reply(http(b"", "404 Not Found"))
        hashes = SentChecksums()
        for name, tensor in (self._sent if self.checker == "sent" else self.model.state_dict()).items():
            hashes.add(name, tensor)
        found = hashes.result()
        return {**OK, "per_engine_checksum": str(hash(tuple(sorted(found.items())))), "ranks": [{"checksums": found}]}


def _tensors(message: bytes) -> dict[str, torch.Tensor]:
    bucket = pickle.loads(message)  # noqa: S301  (as SGLang does; the test sent it)
    return {
        entry.name: bucket["flattened_tensor"][entry.start_idx : entry.end_idx].view(entry.dtype).view(entry.shape)
        for entry in bucket["metadata"]
    }


def _spoil(held: dict[str, torch.Tensor], how: str) -> None:
    """What a server does to whole weights without a word."""
    norm, other = (held[f"model.layers.1.{name}_layernorm.weight"] for name in ("input", "post_attention"))
    if how == "swapped":
        kept = norm.clone()
        norm.copy_(other)
        other.copy_(kept)
    elif how == "a bit":
        bits = norm.view(torch.int32)
        bits[3] ^= 1 << 22
