"""A trainer's side of servers that misbehave (``faulty_server.py``): a student, a pool, and what they find out."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd.errors import EngineError
from megatron_tropd.sglang.settings import SGLangSettings
from tests.faulty_server import FaultyServer
from tests.hf_models import make_hf_model
from tests.sglang_helpers import Student, check_rollouts, make_pool, params, reference_logprobs, requests_of
from tests.sglang_replies import ARCH

PATIENCE_S = 30.0
"""--sglang-request-timeout, but where a server falls silent."""
REQUESTS = requests_of(1, samples=2, max_new=4)
PROBES = [[3, 7, 11, 19, 5]]


class Run:
    """What a trainer has: a student, and a pool on servers that are not its own."""

    def __init__(self, *servers: FaultyServer, **changes) -> None:
        options = {"request_timeout_s": PATIENCE_S, "start_timeout_s": PATIENCE_S, "bucket_bytes": 100_000, **changes}
        settings = SGLangSettings(
            hf_dir=Path(), log_dir=Path(), dtype="float32", urls=tuple(server.url for server in servers), **options
        )
        self.servers, self.student = servers, Student(make_hf_model("qwen3"))
        self.pool = make_pool(settings, ARCH, self.student, probes=PROBES)

    def push(self):
        """New weights, as the trainer has them, and what it finds out by the probes: the largest difference."""
        version = self.student.change()
        report = self.pool.push(self.student.export, version)
        expected = [reference_logprobs(self.student.model, probe) for probe in PROBES]
        return {
            name: max(
                abs(a - b) for one, two in zip(found, expected, strict=True) for a, b in zip(one, two, strict=True)
            )
            for name, found in report.probe_logprobs.items()
        }

    def write(self, requests=REQUESTS) -> None:
        """A batch: every rollout has the log-probabilities of the student's own model."""
        version = self.student.version
        rollouts = self.pool.generate(requests, params(), version)
        assert check_rollouts(rollouts, requests, self.student.model, version) < 1e-5

    @contextlib.contextmanager
    def impatient(self, silence_s=0.3):
        """Servers are given up on after so much silence."""
        engines = self.pool._fleet.engines
        for engine in engines:
            usual, engine._settings = engine._settings, replace(engine._settings, request_timeout_s=silence_s)
            engine._watch._silence_s = silence_s
        yield
        for engine in engines:
            engine._settings = usual
            self.pool._loop.run(engine.start())

    def forgive(self) -> None:
        """Each case of a test is the first."""
        for engine in self.pool._fleet.engines:
            engine.failures = 0

    def counted(self, **expected) -> None:
        """The counters that have counted."""
        assert {name: count for name, count in self.pool.counts.items() if count} == expected


@contextlib.contextmanager
def running(number: int = 1, **changes):
    """A run on ``number`` servers that have its weights."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(FaultyServer(seed)) for seed in range(number)]
        run = Run(*servers, **changes)
        stack.callback(run.pool.close)
        assert max(run.push().values()) < 1e-5
        yield run


def refusal(work) -> tuple[str, float]:
    """The error of ``work``, and the seconds until it came."""
    start = time.monotonic()
    with pytest.raises(EngineError) as failure:
        work()
    text = str(failure.value)
    text.encode()
    assert len(text) < 6000
    return text, time.monotonic() - start
