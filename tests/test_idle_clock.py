"""The share of the time in which engines had nothing to write, by a clock that the test moves."""

from __future__ import annotations

import pytest

from megatron_tropd.rollout import idle_clock


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(idle_clock.time, "perf_counter", lambda: now[0])

    def pass_(seconds):
        now[0] += seconds

    return idle_clock.IdleClock(), pass_


def test_writing_that_spans_two_readings_counts_once_in_each(clock):
    idle, pass_ = clock
    pass_(1)
    idle.start()
    pass_(3)
    assert idle.idle_share() == pytest.approx(1 / 4)
    pass_(2)
    idle.stop()
    idle.stop()
    pass_(6)
    assert idle.idle_share() == pytest.approx(6 / 8)


def test_without_writing_all_time_is_idle(clock):
    idle, pass_ = clock
    pass_(5)
    assert idle.idle_share() == 1
    idle.start()
    pass_(5)
    assert idle.idle_share() == 0
