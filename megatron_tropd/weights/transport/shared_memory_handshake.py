"""Find out which receivers can open a sender's staging memory, once, when a connection is made.

Whether two ranks share a machine, a PID namespace, a user and a view of a GPU is not deduced but tried.
Where opening fails, the pair's payloads go point to point.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.weights.transport.p2p import P2PGroup
from megatron_tropd.weights.transport.shared_memory import SharedSegment, open_segment

log = logging.getLogger(__name__)

OFFER_TAG, OPENED_TAG = 5, 6
_FRAME_BYTES = 1 << 16
"""Size of an offer or an answer.  Handles of CUDA memory in expandable segments are long: they list every segment."""
_PROBLEM_CHARACTERS = 1000
"""Of the text of an answer, so that it fits."""


def _pack(value: object) -> Tensor:
    data = json.dumps(value).encode()
    if len(data) > _FRAME_BYTES:
        raise ValueError(f"handles of shared memory take {len(data)} bytes; {_FRAME_BYTES} are provided for")
    return torch.frombuffer(bytearray(data.ljust(_FRAME_BYTES)), dtype=torch.uint8)


def _unpack(frame: Tensor) -> Any:
    """Read what :func:`_pack` made; ValueError if it is something else."""
    try:
        return json.loads(frame.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def _problem(answer: Tensor) -> str:
    """Why a peer could not open the segments; empty if it could."""
    try:
        text = _unpack(answer)
    except ValueError as error:
        return f"its answer {error}"
    return text if isinstance(text, str) else "its answer is no text"


def _open(offered: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    handles = _unpack(offered)
    if not isinstance(handles, list) or len(handles) != len(sizes):
        raise ValueError(f"expected handles of {len(sizes)} segments")
    return [open_segment(*pair) for pair in zip(handles, sizes, strict=True)]


def offer(p2p: P2PGroup, segments: Sequence[SharedSegment], peers: Mapping[int, str]) -> frozenset[int]:
    """Offer the segments to every peer and return the peers that opened them.  The peers call :func:`accept`.

    Raises:
        TransportError: a peer is gone, or did not answer in time.
    """
    try:
        answers = {
            peer: p2p.receive(p2p.empty(_FRAME_BYTES), peer, OPENED_TAG, f"answer of {name} to shared memory")
            for peer, name in peers.items()
        }
        offers = [
            p2p.send(_pack([s.handle() for s in segments]), peer, OFFER_TAG, f"offer of shared memory to {name}")
            for peer, name in peers.items()
        ]
        for transfer in (*offers, *answers.values()):
            transfer.wait()
    finally:
        for segment in segments:
            segment.close()
    problems = {peer: _problem(answer.data) for peer, answer in answers.items()}
    for peer, problem in problems.items():
        if problem:
            log.warning("%s cannot share this rank's memory, its weights go point to point: %s", peers[peer], problem)
    return frozenset(peer for peer, problem in problems.items() if not problem)


def accept(p2p: P2PGroup, sizes: Mapping[int, Sequence[int]], peers: Mapping[int, str]) -> dict[int, list[Tensor]]:
    """Open the segments that every sender offers; return them by sender, for senders where that was possible.

    Args:
        sizes: By sender: size of each of its segments in bytes.

    Raises:
        TransportError: a peer is gone, or offered nothing in time.
    """
    opened: dict[int, list[Tensor]] = {}
    offers = {
        peer: p2p.receive(p2p.empty(_FRAME_BYTES), peer, OFFER_TAG, f"offer of shared memory by {name}")
        for peer, name in peers.items()
    }
    answers = []
    for peer, transfer in offers.items():
        transfer.wait()
        problem = ""
        try:
            opened[peer] = _open(transfer.data, sizes[peer])
        except (OSError, ValueError, RuntimeError) as error:  # CUDA raises RuntimeError
            problem = f"{type(error).__name__}: {error}"[:_PROBLEM_CHARACTERS]
        answers.append(p2p.send(_pack(problem), peer, OPENED_TAG, f"answer to {peers[peer]}"))
    for answer in answers:
        answer.wait()
    return opened
