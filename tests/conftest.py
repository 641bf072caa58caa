"""Fixtures shared by all tests."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from megatron_tropd.parallel import platform

platform.install()

from tests.ranks import RankPools  # noqa: E402  (torch must be patched before Megatron is imported)


@pytest.fixture(scope="session")
def ranks():
    """Pools of real gloo ranks: ``ranks(2).run(function, *args)``."""
    pools = RankPools()
    yield pools
    pools.close()
