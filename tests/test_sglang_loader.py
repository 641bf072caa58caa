"""What the planned loader is sent by mistake must not end the server that it runs in."""

from __future__ import annotations

import base64
import gc
import json
import pickle

import pytest
import torch

from megatron_tropd.parallel.side_group import LOOPBACK, host_store
from megatron_tropd.weights.engine_loader import LOADER, REQUEST, LoaderRequest, outcome_key, read_outcomes
from megatron_tropd.weights.transport.message import TransportError
from tests.test_sglang_planned import Link

GOOD = {"do": "close", "group": "g", "engine": 0, "ticket": "0"}


def _row(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _named(value) -> dict[str, torch.Tensor]:
    return {REQUEST: _row(json.dumps(value).encode())}


BAD = {
    "another name": {"weight": torch.zeros(3)},
    "nothing": {},
    "numbers that are no bytes": {REQUEST: torch.full((3,), 1e9)},
    "no JSON": {REQUEST: _row(b"{")},
    "no text": {REQUEST: _row(b"\xff\xfe\x00")},
    "deep": {REQUEST: _row(b"[" * 100_000 + b"]" * 100_000)},
    "a list": _named([1, 2]),
    "a field missing": _named({"do": "close", "group": "g"}),
    "a field too many": _named({**GOOD, "shape": 3}),
    "an unknown request": _named({**GOOD, "do": "destroy"}),
    "a group that is a list": _named({**GOOD, "group": ["g"]}),
    "an engine that is a text": _named({**GOOD, "engine": "0"}),
    "an engine that is true": _named({**GOOD, "engine": True}),
    "a port that is none": _named({**GOOD, "do": "locate", "port": None}),
}


@pytest.mark.parametrize("what", sorted(BAD))
def test_what_is_no_request_is_a_value_error(what):
    with pytest.raises(ValueError, match=r"expected|fields|JSON|Expecting|decode"):
        LoaderRequest.from_tensors(BAD[what])


def test_a_request_is_read_as_it_was_written():
    request = LoaderRequest(do="locate", group="g", engine=1, ticket="7", port=80, timeout_s=5, spec="{}")
    assert LoaderRequest.from_tensors(dict(request.named_tensors())) == request


@pytest.mark.parametrize(
    "text", [b"{", b"[]", b"{}", b'{"location": {"x": 1}}', b'{"location": null, "x": 1}', b"\xff"]
)
def test_an_outcome_that_cannot_be_read_names_engine_and_rank(text):
    store = host_store(timeout_s=30)
    request = LoaderRequest(do="locate", group="g", engine=3, ticket="0")
    store.set(outcome_key("g", 3, 0, "0"), text)
    with pytest.raises(TransportError, match="engine 3 rank 0 reported an outcome of locate that cannot be read"):
        read_outcomes(store, request, 1, timeout_s=30)


def _body(tensors: dict[str, torch.Tensor]) -> bytes:
    message = base64.b64encode(pickle.dumps(list(tensors.items()))).decode()
    return json.dumps(
        {"load_format": LOADER, "serialized_named_tensors": [message], "flush_cache": False, "weight_version": None}
    ).encode()


def test_a_server_survives_what_is_no_request(sglang):
    sglang.push()
    engine, store = sglang.engines[0], host_store(timeout_s=60)
    pid = engine.server.pid
    request = LoaderRequest(
        do="locate", group="g", engine=0, ticket="0", host=LOOPBACK, port=store.port, timeout_s=60.0
    )  # fmt: skip
    sglang.run(sglang.pool._fleet.begin_update())
    for tensors in BAD.values():
        sglang.run(engine.call_loader(_body(tensors), what="nonsense", timeout_s=120.0))
    sglang.run(engine.call_loader(_body(dict(request.named_tensors())), what="locate", timeout_s=120.0))
    assert len(read_outcomes(store, request, 1, timeout_s=60)) == 1, "a good request is still carried out"
    assert engine.server.pid == pid and engine.server.is_running()
    sglang.push()
    sglang.run(engine.check_health())


@pytest.mark.thorough
def test_a_server_survives_a_trainer_that_has_left(sglang):
    """The store of its group is gone, so nobody can be told how a request ended."""
    sglang.push()
    link = Link(sglang)
    group, pids = link.engines.group, [engine.server.pid for engine in sglang.engines]
    link.trainers.kill()
    link.store = link.engines._store = None
    gc.collect()
    for ticket in range(3):
        body = _body(_named({**GOOD, "do": "receive", "group": group, "version": 10**6, "ticket": str(ticket)}))
        sglang.run(sglang.engines[0].call_loader(body, what="receive", timeout_s=300.0))
    assert [engine.server.pid for engine in sglang.engines] == pids
    sglang.push()
    sglang.run(sglang.engines[0].check_health())
