"""Kinds of misbehaviour of a server: what it sends in the place of a good answer.  ``faulty_server.py`` plays them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.hf_models import VOCAB_SIZE
from tests.sglang_replies import Reply, answer, http


@dataclass(frozen=True, slots=True)
class Play:
    """A kind of misbehaviour: what is sent in the place of a good answer, drawn by random numbers."""

    reply: Callable[[Any, random.Random], Reply]
    works: bool = True
    """Whether the server does what it was asked for before it answers."""


def _busy(status: str, *headers: str) -> Play:
    return Play(lambda _value, _numbers: Reply(http(b"busy", status, *headers)), works=False)


def _in_a_sample(change: Callable[[Any, random.Random], None]) -> Play:
    """Damages one sample; ``change`` gets it as it is in the answer."""

    def reply(value: Any, numbers: random.Random) -> Reply:
        value = copy.deepcopy(value)
        change(numbers.choice(value) if isinstance(value, list) else value, numbers)
        return answer(value)

    return Play(reply)


def _entries(sample: Any) -> list[Any]:
    """Log-probabilities with their ids: of written tokens, or of given ones."""
    meta = sample["meta_info"]
    return meta["output_token_logprobs"] if sample["output_ids"] else meta["input_token_logprobs"]


def _logprob(value: Any) -> Play:
    def change(sample: Any, numbers: random.Random) -> None:
        entries = _entries(sample)
        entries[numbers.randrange(0 if sample["output_ids"] else 1, len(entries))][0] = value

    return _in_a_sample(change)


def _token(value: int) -> Play:
    def change(sample: Any, numbers: random.Random) -> None:
        entries = _entries(sample)
        place = numbers.randrange(0 if sample["output_ids"] else 1, len(entries))
        entries[place][1] = value
        if sample["output_ids"]:
            sample["output_ids"][place] = value

    return _in_a_sample(change)


def _meta(name: str, value: Callable[[Any], Any]) -> Play:
    def change(sample: Any, _numbers: random.Random) -> None:
        sample["meta_info"][name] = value(sample["meta_info"].get(name))

    return _in_a_sample(change)


def _other_prompt(sample: Any, numbers: random.Random) -> None:
    tokens = sample["prompt_token_ids"] = list(sample["prompt_token_ids"])
    place = numbers.randrange(len(tokens))
    tokens[place] = (tokens[place] + 1) % VOCAB_SIZE


def _two_versions(sample: Any, _numbers: random.Random) -> None:
    spans = sample["meta_info"]["weight_versions"]
    sample["meta_info"]["weight_versions"] = [{**spans[0], "version": "3", "end": 1}, {**spans[0], "start": 1}]


def _content(content: bytes) -> Play:
    return Play(lambda _value, _numbers: Reply(http(content)), works=False)


BUSY = {
    "503": _busy("503 Service Unavailable"),
    "503 with Retry-After": _busy("503 Service Unavailable", "retry-after: 1"),
    "503 with a date": _busy("503 Service Unavailable", "retry-after: Fri, 31 Dec 1999 23:59:59 GMT"),
    "429": _busy("429 Too Many Requests"),
    "429 with Retry-After": _busy("429 Too Many Requests", "retry-after: 1"),
}  # fmt: skip
BROKEN = {
    "reset at once": Play(lambda _value, _numbers: Reply(b"", "reset"), works=False),
    "reset somewhere": Play(lambda value, numbers: reset_after(value, numbers.random())),
    "500": Play(lambda _value, _numbers: Reply(http(b"oh", "500 Internal Server Error")), works=False),
}
SILENT = {
    "silence": Play(lambda _value, _numbers: Reply(b"", "hang"), works=False),
    "half an answer": Play(lambda value, _numbers: Reply(answer(value).raw[:-9], "hang")),
    "a byte now and then": Play(lambda value, _numbers: Reply(answer(value).raw, "drip")),
}
NOT_JSON = {
    "a page": _content(b"<html><body>502 Bad Gateway</body></html>"),
    "nothing": _content(b""),
    "no UTF-8": _content(b'{"text": "\xff\xfe"}'),
    "a cut text": Play(lambda value, numbers: Reply(http(json.dumps(value).encode()[: -numbers.randint(1, 9)]))),
}
SHAPES = {f"the JSON {json.dumps(value)}": _content(json.dumps(value).encode())
          for value in (None, [], {}, [[]], "what", 3, True, {"error": {"message": "sorry"}})}  # fmt: skip
NUMBERS = {
    "too few log-probabilities": _in_a_sample(lambda sample, _numbers: _entries(sample).pop() and None),
    "too many log-probabilities": _in_a_sample(lambda sample, _n: _entries(sample).append(_entries(sample)[-1])),
    "NaN": _logprob(float("nan")),
    "Infinity": _logprob(float("inf")),
    "-Infinity": _logprob(float("-inf")),
    "null": _logprob(None),
    "a positive log-probability": _logprob(0.5),
    "a negative id": _token(-1),
    "an id beyond the vocabulary": _token(VOCAB_SIZE + 5),
}  # fmt: skip
ANOTHER = {
    "the answer to another prompt": _in_a_sample(_other_prompt),
    "the answer to a longer prompt": _meta("prompt_tokens", lambda number: number + 1),
}
WRITTEN = {
    "another finish reason": _meta("finish_reason", lambda reason: {"type": "abort"}),
    "finished for no reason": _meta(
        "finish_reason", lambda reason: {"type": "length" if reason["type"] == "stop" else "stop"}
    ),
    "a sample too few": Play(lambda value, _numbers: answer(value[:-1])),
    "a sample twice": Play(lambda value, _numbers: answer([value[0], *value[:-1]])),
}  # fmt: skip
STALE = {
    "the version of before": _meta("weight_version", lambda version: "0" + version[1:]),
    "the version of another run": _meta("weight_version", lambda version: version.partition("-")[0] + "-cafe"),
    "the version without a run": _meta("weight_version", lambda version: version.partition("-")[0]),
    "no version": _meta("weight_version", lambda version: None),
    "two versions": _in_a_sample(_two_versions),
}
PLAYS = {**BUSY, **BROKEN, **SILENT, **NOT_JSON, **SHAPES, **NUMBERS, **ANOTHER, **WRITTEN, **STALE}
"""Every kind, by name."""


def reset_after(value: Any, where: float | int) -> Reply:
    """``value`` as a good answer, cut by a reset: after so many bytes, or after such a share of them."""
    raw = answer(value).raw
    return Reply(raw[: where if isinstance(where, int) else int(where * len(raw))], "reset")
