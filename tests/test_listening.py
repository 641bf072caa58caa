"""Where the processes of one machine listen: on the loopback address, and what torchrun opens beyond that."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_tropd.parallel.interfaces import choose_loopback, without_chosen
from megatron_tropd.sglang.server.command import meeting_environment
from megatron_tropd.sglang.server.process import ServerProcess
from megatron_tropd.sglang.server_flags import TEACHER_FLAGS
from megatron_tropd.sglang.settings import ServerSettings
from tests import torchrun_jobs
from tests.listening_job import listening
from tests.sglang_helpers import needs_sglang
from tests.waiting import wait_for

LOOPBACK_LAUNCH = ("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--local-addr", "127.0.0.1")
LOOPBACK_VARIABLES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""As docs/launch.md says."""


def beyond_loopback(sockets) -> set[int]:
    """Ports of the (address, port) pairs that other machines may reach."""
    return {port for address, port in sockets if not ipaddress.ip_address(address).is_loopback}


def listening_of_a_job(tmp_path, launcher, **env):
    """What rank 0 of a job of two ranks says (tests/listening_job.py)."""
    environment = torchrun_jobs.environment(**env)
    environment.pop("GLOO_SOCKET_IFNAME", None)
    file = tmp_path / "sockets.json"
    with torchrun_jobs.start([str(file)], tmp_path, environment, "tests.listening_job", launcher=launcher) as job:
        assert job.wait(timeout=120) == 0, job.output
    said = json.loads(file.read_text())
    assert said["interface"] == "lo" and len(said["sockets"]) > 4
    return said


def test_the_documents_say_what_is_tested_here():
    text = (torchrun_jobs.ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    assert f"torchrun {' '.join(LOOPBACK_LAUNCH)} --nproc-per-node" in text
    assert all(f"export {name}={value}" in text for name, value in LOOPBACK_VARIABLES.items())


@pytest.mark.slow
def test_a_job_of_one_machine_can_be_started_so_that_it_listens_on_loopback_only(tmp_path):
    said = listening_of_a_job(tmp_path, LOOPBACK_LAUNCH, **LOOPBACK_VARIABLES)
    assert not beyond_loopback(said["sockets"])
    assert said["master port"] in dict(map(reversed, said["sockets"]))


@pytest.mark.slow
def test_with_standalone_only_torchruns_own_stores_listen_elsewhere(tmp_path):
    said = listening_of_a_job(tmp_path, ("--standalone",))
    assert said["master port"] in beyond_loopback(said["sockets"]) and len(beyond_loopback(said["sockets"])) == 2


@needs_sglang
def test_a_server_on_loopback_and_all_its_processes_listen_there_only(sglang):
    sglang.push()  # waits until they are up
    for engine in sglang.engines:
        sockets = listening(psutil.Process(engine.server.pid))
        assert len(sockets) > 3 and not beyond_loopback(sockets)


def test_what_is_between_the_processes_of_a_server_stays_on_its_machine(tmp_path):
    settings = ServerSettings(
        names=TEACHER_FLAGS, hf_dir=tmp_path, log_dir=tmp_path, dtype="float32", python=tmp_path
    )  # fmt: skip
    found = meeting_environment(settings, 4000, tmp_path / "meeting")
    assert found["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] == f"file://{tmp_path}/meeting"
    assert (found["GLOO_SOCKET_IFNAME"], found["MASTER_PORT"]) == ("lo", "4000")
    for flags in (("--nnodes", "2"), ("--dist-init-addr=10.0.0.1:4",)):
        assert not meeting_environment(replace(settings, flags=flags), 4000, tmp_path / "meeting")


def test_the_file_in_which_a_servers_processes_meet_is_its_own_and_goes_with_it(tmp_path, monkeypatch):
    """Also a name that the user has set goes before."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\nenv > "$0.env"; stat -c %a "${SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE#file://}"; sleep 60\n'
    )
    python.chmod(0o700)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    settings = ServerSettings(names=TEACHER_FLAGS, hf_dir=tmp_path, log_dir=tmp_path, dtype="float32", python=python)
    server = ServerProcess(settings, 0, 64)
    seen = []
    for _ in range(2):
        server.start()
        process = SimpleNamespace(poll=server.exit_status)
        wait_for(lambda: server.log.read_text().endswith("600\n"), process, timeout=30)
        variables = dict(line.partition("=")[::2] for line in Path(f"{python}.env").read_text().splitlines())
        seen.append(Path(variables["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"].removeprefix("file://")))
        assert variables["GLOO_SOCKET_IFNAME"] == "ib0" and seen[-1].read_bytes() == b""
    server.stop()
    assert len(set(seen)) == 2 and not any(path.exists() for path in seen)


def test_a_server_inherits_the_interface_only_if_the_user_has_chosen_it():
    ours, users = {"A": "1"}, {"A": "1", "GLOO_SOCKET_IFNAME": "ib0"}
    for environ in (ours, users):
        before = dict(environ)
        choose_loopback(environ)
        assert without_chosen(environ) == before
    assert ours["GLOO_SOCKET_IFNAME"] == "lo" and users["GLOO_SOCKET_IFNAME"] == "ib0"
