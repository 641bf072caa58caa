"""A whole run on two machines: the student on the first, its teacher on the second, an SGLang server on each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time

import psutil
import pytest

from tests.sglang_helpers import KEYS, PYTHON
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import command_of
from tests.two_machines import Machine, two_machines, unavailable
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.servers]

STEPS = 10
TIMEOUT_S = 400.0


def _records(metrics):
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def _processes(machine: Machine) -> list[psutil.Process]:
    listed = subprocess.run(
        ["ip", "netns", "pids", machine.namespace], capture_output=True, text=True, check=True, timeout=30
    )
    return [psutil.Process(int(pid)) for pid in listed.stdout.split() if psutil.pid_exists(int(pid))]


def _server(machine: Machine) -> psutil.Process:
    """The leader of the process group of the machine's SGLang server."""
    for process in _processes(machine):
        if any("launch.py" in word for word in command_of(process)) and os.getpgid(process.pid) == process.pid:
            return process
    raise AssertionError("the second machine has no server")


def _left(machines) -> list[list[str]]:
    """Command lines of what still runs after the end (a zombie has none); killed servers are given a moment."""
    deadline = time.monotonic() + 30
    while left := [words for machine in machines for p in _processes(machine) if (words := command_of(p))]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def _wait_for_step(metrics, jobs) -> None:
    wait_for(lambda: _records(metrics) or any(job.poll() is not None for job in jobs), timeout=TIMEOUT_S)
    assert all(job.poll() is None for job in jobs), "no step was made"


@pytest.mark.thorough
def test_teacher_and_a_server_on_the_second_machine(tmp_path):
    if reason := unavailable():
        pytest.skip(reason)
    world, run = make_world(tmp_path / "world"), tmp_path / "run"
    argv = flags(
        world, run, train_iters=STEPS, teacher_placement="dedicated", teacher_world_size=2,
        teacher_tensor_model_parallel_size=2, rollout_engine="sglang", rollout_num_engines_per_node=1,
        sglang_python=PYTHON, sglang_start_timeout=240,
    )  # fmt: skip
    keys = {"TROPD_SGLANG_API_KEY": KEYS.api, "TROPD_SGLANG_ADMIN_API_KEY": KEYS.admin}
    outputs = [tmp_path / f"output-{number}" for number in range(2)]
    with two_machines() as machines:
        jobs = [m.start(argv, 2, output, **keys) for m, output in zip(machines, outputs, strict=True)]
        try:
            _wait_for_step(run / "metrics.jsonl", jobs)
            os.killpg(_server(machines[1]).pid, signal.SIGKILL)
            ends = [job.wait(timeout=TIMEOUT_S) for job in jobs]
        finally:
            for job in jobs:
                job.kill()
        left = _left(machines)
    printed = "\n\n".join(output.read_text() for output in outputs)
    assert ends == [0, 0], printed
    records = [record["metrics"] for record in _records(run / "metrics.jsonl")]
    assert len(records) == STEPS, printed
    assert records[-1]["engine/restarts"] >= 1 and records[-1]["engine/given_up"] == 0
    assert all(record["teacher/wait_s"] > 0 for record in records)
    logs = run / "engines"
    assert (logs / "sglang-0-start-1.log").is_file() and (logs / "sglang-1-start-2.log").is_file(), "restarted there"
    for server in range(2):
        wrote = [p for p in logs.glob(f"sglang-{server}-start-*.log") if '"POST /generate HTTP' in p.read_text()]
        assert wrote, f"server {server} wrote nothing"
    assert not left, "processes were left behind"
