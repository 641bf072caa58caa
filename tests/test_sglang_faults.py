"""Servers that are killed: no rollout is lost, none is made by old weights, nothing outlives the trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.sglang_helpers import PYTHON, check_rollouts, needs_sglang, params, reference_logprobs, requests_of
from tests.waiting import wait_for


def _kill_when_busy(sglang, victims) -> threading.Thread:
    """SIGKILL the schedulers' group of ``victims`` as soon as each has prompts in flight."""

    def work():
        for engine in victims:
            wait_for(lambda engine=engine: engine.prompts_in_flight)
            os.killpg(engine.server.pid, signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def _generate_while_killing(sglang, victims, version):
    requests = requests_of(12, samples=2, max_new=60)
    killer = _kill_when_busy(sglang, victims)
    rollouts = sglang.pool.generate(requests, params(), version)
    killer.join(timeout=60)
    worst = check_rollouts(rollouts, requests, sglang.student.model, version)
    assert worst < 1e-5, "written by the weights that were pushed last"


@pytest.mark.thorough
@pytest.mark.fault(number=15)
def test_one_of_two_servers_is_killed_while_it_writes_and_the_other_before_a_push(sglang):
    """The other one takes over; both dead are started before any is waited for, and the next push is whole on both."""
    version = sglang.push()
    witness, victim = sglang.engines
    before = sglang.pool.counts
    _generate_while_killing(sglang, [victim], version)
    after = sglang.pool.counts
    assert victim.version is None and witness.version == version
    assert after["restarts"] == before.get("restarts", 0) + 1
    assert after["reissued"] > before.get("reissued", 0)
    starts = witness.starts
    os.killpg(witness.server.pid, signal.SIGKILL)
    witness.server._process.wait(timeout=60)
    sglang.run(sglang.pool._fleet.wait_until_up())
    assert witness.starts == starts + 1 and victim.is_up and witness.is_up
    version = sglang.push()
    assert victim.version == witness.version == version and witness.checksum == victim.checksum


@pytest.mark.fault(number=16)
@pytest.mark.thorough
def test_what_dead_servers_did_not_write_is_written_by_the_weights_of_the_trainer_then(sglang):
    """As with --rollout-lag 1: the trainer has made an update when it asks for the batch."""
    version = sglang.push()
    before = sglang.student.model
    requests = requests_of(12, max_new=120)
    killer = _kill_when_busy(sglang, sglang.engines)
    sglang.pool.submit(requests, params(), version)
    killer.join(timeout=60)
    newer = sglang.student.change()
    rollouts = sglang.pool.finished(newer)
    assert any(rollout.weight_version == (newer, newer) for rollout in rollouts)
    for written_by, model in ((version, before), (newer, sglang.student.model)):
        pairs = [p for p in zip(rollouts, requests, strict=True) if p[0].weight_version == (written_by, written_by)]
        assert check_rollouts([r for r, _ in pairs], [q for _, q in pairs], model, written_by) < 1e-5
    assert {engine.version for engine in sglang.engines} == {newer} and sglang.pool.weight_version == newer


@pytest.mark.fault(number=16)
def test_all_servers_are_killed_while_they_write(sglang):
    """They are started anew and get the current weights by another export, in the middle of the batch."""
    version = sglang.push()
    before = sglang.pool.counts.get("restarts", 0)
    _generate_while_killing(sglang, sglang.engines, version)
    assert sglang.pool.counts["restarts"] == before + 2
    assert {engine.version for engine in sglang.engines} == {version}


@pytest.mark.thorough
def test_a_server_that_is_killed_before_a_probe_is_given_its_weights_again_and_asked_again(sglang):
    version = sglang.push()
    before = sglang.pool.counts.get("restarts", 0)
    os.killpg(sglang.engines[0].server.pid, signal.SIGKILL)
    tokens = [3, 7, 11, 19, 5]
    scores = sglang.pool.score([tokens], version)
    assert sglang.pool.counts["restarts"] == before + 1 and len(scores) == 2
    reference = reference_logprobs(sglang.student.model, tokens)
    for (of_engine,) in scores.values():
        assert max(abs(a - b) for a, b in zip(of_engine, reference, strict=True)) < 1e-5


_TRAINER = """
import sys, time
from pathlib import Path
import pytest

from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.settings import SGLangSettings
settings = SGLangSettings(hf_dir=Path(sys.argv[1]), log_dir=Path(sys.argv[1]), dtype="float32", python=Path(sys.argv[2]))
server = ServerProcess(settings, 0, 128)
server.start()
print(server.pid, flush=True)
time.sleep(600)
"""


@needs_sglang
def test_a_server_ends_with_its_trainer_even_if_that_is_killed(tmp_path):
    arguments = [sys.executable, "-c", _TRAINER, str(tmp_path), str(PYTHON)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as trainer:
        leader = int(trainer.stdout.readline())
        assert Path(f"/proc/{leader}").exists()
        trainer.kill()
    wait_for(lambda: not _alive(leader))


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
