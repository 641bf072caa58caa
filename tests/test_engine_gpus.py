"""Which GPUs SGLang servers get, on one machine and on several."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tropd.cli import parse
from megatron_tropd.parallel import platform
from megatron_tropd.setup.engine_settings import sglang_settings
from tests.sglang_helpers import KEYS
from tests.tiny_run import flags


class _Student:
    hf_dir = Path()


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """Settings on a machine with eight GPUs; nothing is started."""
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("TROPD_SGLANG_API_KEY", KEYS.api)
    monkeypatch.setenv("TROPD_SGLANG_ADMIN_API_KEY", KEYS.admin)

    def make(ranks, **changes):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        argv = flags(tmp_path, tmp_path / "run", rollout_engine="sglang", sglang_python=__file__, **changes)
        return sglang_settings(parse(argv), _Student())

    return make


def test_the_last_gpus_of_a_machine_are_the_servers(settings):
    made = settings(4, rollout_num_gpus_per_node=4, rollout_num_engines=2, sglang_tp_size=2)
    assert [made.gpus_of(index) for index in range(2)] == [(4, 5), (6, 7)]


def test_ranks_and_servers_that_need_more_gpus_than_there_are(settings):
    with pytest.raises(ValueError, match=r"--rollout-num-gpus-per-node 4 and the 5 ranks .* need 9 GPUs; it has 8"):
        settings(5, rollout_num_gpus_per_node=4, rollout_num_engines=4)


def test_every_machine_numbers_its_gpus_anew(settings, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    made = settings(4, rollout_num_gpus_per_node=4, rollout_num_engines_per_node=2, sglang_tp_size=2)
    assert made.num_servers == 4 and [made.node_of(index) for index in range(4)] == [0, 0, 1, 1]
    assert [made.gpus_of(index) for index in range(4)] == [(4, 5), (6, 7), (4, 5), (6, 7)]
