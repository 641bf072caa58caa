"""Answers of SGLang's control endpoints: checked and read.  Pure; :mod:`generation` reads /generate.

Raises (every function):
    BadResponse: the answer is not what the endpoint answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_tropd.json_files import shown
from megatron_tropd.sglang.api.fields import field, integer, items, number, text
from megatron_tropd.sglang.errors import BadResponse

_MAX_RANKS = 4096
_MAX_TOKENS = 1 << 40
_INPUT_RESERVE = 4
"""SGLang's scheduler ends a sequence this many tokens beyond the longest input it reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """What matters here of /server_info."""

    is_cpu: bool
    dtype: str
    tp_size: int
    ep_size: int
    max_input: int
    """Longest sequence that can be given, in tokens."""

    @property
    def max_tokens(self) -> int:
        """Longest sequence (prompt and response) that the server can complete, in tokens."""
        return self.max_input + _INPUT_RESERVE


def read_server_info(body: Any) -> ServerInfo:
    """Read the answer of /server_info."""
    device, dtype = text(field(body, "device"), "device"), text(field(body, "dtype"), "dtype")
    return ServerInfo(
        is_cpu=device == "cpu",
        dtype=dtype,
        tp_size=integer(field(body, "tp_size"), "tp_size", low=1, high=_MAX_RANKS),
        ep_size=integer(body.get("ep_size", 1), "ep_size", low=1, high=_MAX_RANKS),
        max_input=integer(field(body, "max_req_input_len"), "max_req_input_len", low=1, high=_MAX_TOKENS),
    )


def read_model_type(body: Any) -> str:
    """Return the ``model_type`` of the model's config.json in the answer of /model_info."""
    return text(field(body, "model_type"), "model_type")


def read_weight_version(body: Any) -> str:
    """Return the weight version in the answer of /model_info."""
    return text(field(body, "weight_version"), "weight_version")


def check_done(body: Any) -> None:
    """Check the answer of an endpoint that changes weights: anything but success leaves unknown weights."""
    if field(body, "success") is not True:
        raise BadResponse(f"success is {shown(body['success'])}, message {shown(body.get('message'))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldChecksums:
    """Checksums of the weights that a server holds."""

    by_name: dict[str, str]
    """By the server's parameter names, over all its ranks."""
    engine: str
    """One checksum over all ranks."""


def read_checksums(body: Any) -> HeldChecksums:
    """Read the answer of /weights_checker."""
    check_done(body)
    held: dict[str, str] = {}
    for rank in items(field(body, "ranks"), "ranks"):
        checksums = field(rank, "checksums")
        if not isinstance(checksums, dict):
            raise BadResponse(f"checksums is {shown(checksums)}; expected an object")
        held |= {name: text(value, f"checksum of {shown(name)}") for name, value in checksums.items()}
    return HeldChecksums(by_name=held, engine=text(field(body, "per_engine_checksum"), "per_engine_checksum"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the scheduler of a server last reported of its work (/v1/loads)."""

    running: int
    """Requests that are being written."""
    waiting: int
    """Requests in the scheduler's queue."""
    work: tuple[tuple[float, ...], ...]
    """One tuple per scheduler.  It changes when the scheduler computes tokens of a request, and at no other time."""

    def __str__(self) -> str:
        return f"requests running {self.running}, waiting {self.waiting}"


def together(loads: Sequence[Load]) -> Load:
    """Return the load of several servers, which shows work when any of them does."""
    return Load(
        running=sum(load.running for load in loads),
        waiting=sum(load.waiting for load in loads),
        work=tuple(work for load in loads for work in load.work),
    )


def read_load(body: Any) -> Load:
    """Read the answer of /v1/loads.

    A scheduler reports at every prefill, every few steps of decoding (--load-snapshot-publish-interval, 15) and when
    it becomes idle.  An idle scheduler, or one whose queue is stuck, goes on reporting, so the time of a report counts
    as work only while requests run; the counters of prefill cover requests that are only scored, which never run.
    """
    running, waiting, work = 0, 0, []
    for entry in items(field(body, "loads"), "loads"):
        here = integer(field(entry, "num_running_reqs"), "num_running_reqs", low=0, high=_MAX_TOKENS)
        running += here
        waiting += integer(field(entry, "num_waiting_reqs"), "num_waiting_reqs", low=0, high=_MAX_TOKENS)
        reported = number(field(entry, "timestamp"), "timestamp") if here else 0.0
        prefilled = [
            number(entry.get(name, 0), name) for name in ("total_prefill_uncached_tokens", "total_prefill_busy_us")
        ]
        work.append((reported, *prefilled))
    return Load(running=running, waiting=waiting, work=tuple(work))
