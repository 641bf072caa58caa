"""Handles of shared memory that are damaged, answers that are no answers, and errors without text."""

from __future__ import annotations

import json
import os

import pytest
import torch

from megatron_tropd.parallel.side_group import host_store, join_store, side_group
from megatron_tropd.weights.transport.message import TransportError
from megatron_tropd.weights.transport.p2p import P2PGroup
from megatron_tropd.weights.transport.shared_memory import SharedSegment, open_segment
from megatron_tropd.weights.transport.shared_memory_handshake import OFFER_TAG, OPENED_TAG, _pack, accept, offer

CPU = torch.device("cpu")


def _handle(**changes):
    good = {"pid": 1, "fd": 3, "name": "tropd-x", "num_bytes": 64}
    return {**good, **changes}


DEEP = "[" * 30_000 + "]" * 30_000
BAD_OFFERS = {
    "a handle with a text for its size": [_handle(num_bytes="64")],
    "a handle without a size": [{"pid": 1, "fd": 3, "name": "x"}],
    "a handle without a process": [{"fd": 3, "name": "x", "num_bytes": 64}],
    "a process that is no number": [_handle(pid=[1])],
    "a handle that is none": [None],
    "a text": ["pid"],
    "a list too long": [_handle(), _handle()],
    "a number": 7,
    "an object": {"pid": 1},
    "a GPU that is a number": [_handle(gpu=0)],
    "a GPU without a handle": [_handle(gpu="GPU-0")],
    "no JSON": b"\xff\x00{",
    "a deep list": DEEP.encode(),
}


def _frame(p2p, value):
    if not isinstance(value, bytes):
        return _pack(value)
    frame = p2p.empty(1 << 16).fill_(ord(" "))
    frame[: len(value)] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
    return frame


def _join(port: int, name: str) -> P2PGroup:
    store = join_store(port=port, timeout_s=60.0)
    rank = int(os.environ["RANK"])
    return P2PGroup(side_group(store, name=name, rank=rank, world_size=2, backend="gloo", timeout_s=60.0), CPU, 60.0)


def _offers(port: int):
    """Body: rank 0 makes every bad offer and then a good one; rank 1 accepts.  Returns what each made of them."""
    p2p, results = _join(port, "offers"), {}
    segment = SharedSegment(64, CPU)
    segment.memory.fill_(7)
    for what, value in BAD_OFFERS.items():
        if os.environ["RANK"] == "0":
            sent = p2p.send(_frame(p2p, value), 1, OFFER_TAG, "offer")
            answer = p2p.receive(p2p.empty(1 << 16), 1, OPENED_TAG, "answer")
            sent.wait()
            answer.wait()
            results[what] = json.loads(answer.data.numpy().tobytes())
        else:
            results[what] = accept(p2p, {0: [64]}, {0: "trainer rank 0"})
    if os.environ["RANK"] == "0":
        results["good"] = offer(p2p, [segment], {1: "engine 0 rank 0"})
    else:
        results["good"] = [memory.tolist() for memory in accept(p2p, {0: [64]}, {0: "trainer rank 0"})[0]]
    return results


def test_an_offer_that_is_no_handle_is_answered_and_a_good_one_still_works(ranks):
    store = host_store(timeout_s=60.0)
    said, made = ranks(2).run(_offers, store.port)
    assert said.pop("good") == {1} and made.pop("good") == [[7] * 64]
    assert all(made[what] == {} for what in BAD_OFFERS)
    assert all(isinstance(said[what], str) and len(said[what]) > 10 for what in BAD_OFFERS), "it says why"


BAD_ANSWERS = (b"\xff{", b'{"a": 1}', b"0", b"null", DEEP.encode())


def _answers(port: int):
    """Body: rank 0 offers memory, rank 1 gives bad answers."""
    p2p, results = _join(port, "answers"), []
    for said in BAD_ANSWERS:
        if os.environ["RANK"] == "0":
            results.append(offer(p2p, [SharedSegment(64, CPU)], {1: "engine 0 rank 0"}))
        else:
            p2p.receive(p2p.empty(1 << 16), 0, OFFER_TAG, "offer").wait()
            p2p.send(_frame(p2p, said), 0, OPENED_TAG, "answer").wait()
    return results


def test_an_answer_that_is_none_means_that_nothing_is_shared(ranks):
    store = host_store(timeout_s=60.0)
    offered, _ = ranks(2).run(_answers, store.port)
    assert offered == [frozenset()] * len(BAD_ANSWERS)


@pytest.mark.parametrize("handle", [None, [], "x", {}, _handle(pid=-1), _handle(fd=10**30), _handle(name=None)])
def test_a_damaged_handle_is_one_of_two_errors(handle):
    with pytest.raises((ValueError, OSError)):
        open_segment(handle, 64)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(), "RuntimeError"), (RuntimeError("\n \nconnection reset\nby peer"), "connection reset"),
        (RuntimeError("\n"), "RuntimeError"), (ConnectionError("gone"), "gone"),
    ],
)  # fmt: skip
def test_an_error_without_text_still_marks_the_group_as_lost(error, said):
    p2p = P2PGroup(None, CPU, 5.0)
    lost = p2p.lost("message to engine 0", error)
    assert isinstance(lost, TransportError) and p2p.broken == f"message to engine 0 failed: {said}"
