"""Heartbeats for nvidia-resiliency-ext: a job of its ft_launcher is ended when a rank gets on no more."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd.parallel.rank_monitor import RankMonitor
from tests.ranks import free_port
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import ROOT, environment

LAUNCHER = "nvidia_resiliency_ext.fault_tolerance.launcher"
PACKAGE = importlib.util.find_spec("nvidia_resiliency_ext")
needs_launcher = pytest.mark.skipif(PACKAGE is None, reason="nvidia-resiliency-ext is not installed")
STUCK = {"AT": "megatron_tropd.training.guard:Guard.judge", "FAULT_RANK": "1", "DELAYED_RANK": "1"}
"""Rank 1 waits for ever where it should judge an update; rank 0 waits for it in a collective."""


def test_without_the_launcher_nothing_is_told(monkeypatch, caplog):
    monkeypatch.delenv("FT_RANK_MONITOR_IPC_SOCKET", raising=False)
    monitor = RankMonitor()
    monitor.tell(1)
    monitor.close()
    assert not caplog.records


def test_a_monitor_that_is_not_there_is_a_warning(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("FT_RANK_MONITOR_IPC_SOCKET", str(tmp_path / "none"))
    with caplog.at_level(logging.WARNING):
        monitor = RankMonitor()
        monitor.tell(1)
        monitor.tell(2)
        monitor.close()
    assert len(caplog.records) == 1 and "cannot be told of progress" in caplog.text


def _launch(argv, tmp_path, timeout_s, **env):
    endpoint = f"127.0.0.1:{free_port()}"
    module = "tests.ending_command" if env else "megatron_tropd.train"
    words = [
        "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint,
        "--ft-rank-heartbeat-timeout", str(timeout_s), "--ft-initial-rank-heartbeat-timeout", "300", "-m", module, *argv,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(Path(next(iter(PACKAGE.submodule_search_locations))).parent)])
    done = subprocess.run(
        [sys.executable, "-m", LAUNCHER, *words], cwd=ROOT, env=environment(PYTHONPATH=path, **env),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    return done.returncode, done.stdout


@needs_launcher
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("hangs", [False, True])
def test_under_the_launcher(tmp_path, hangs):
    """The deadlines of the job's own watch are far away."""
    argv = flags(make_world(tmp_path / "world"), tmp_path / "run", tensor_model_parallel_size=2, train_iters=2)
    code, output = _launch(argv, tmp_path, 30, **(STUCK if hangs else {}))
    assert (code != 0) == hangs, output[-4000:]
    assert ("subsequent heartbeat" in output) == hangs, output[-4000:]
    assert (tmp_path / "run" / "hf_export" / "config.json").is_file() == (not hangs)
