"""A failure on one rank is the same error on every rank, whoever acts and whoever gets the result."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest
import torch.distributed as dist

from megatron_tropd.parallel.fail_together import (
    FailedElsewhere,
    RankFailure,
    from_all_ranks,
    on_all_ranks,
    on_rank_zero,
)

WAYS = {"on_all_ranks": on_all_ranks, "from_all_ranks": from_all_ranks, "on_rank_zero": on_rank_zero}


class _Odd(RuntimeError):
    """An error whose text may not explain itself."""


def _act(way, errors, failure):
    """Run an action that raises ``errors[rank]`` where there is one, and gives 10 x rank elsewhere."""
    rank = dist.get_rank()

    def action():
        if error := errors.get(rank):
            raise error
        return 10 * rank

    try:
        result = WAYS[way](action, failure)
    except Exception as error:
        return type(error), str(error)
    dist.barrier()  # everybody is still there, and in step
    return result


def _outcomes(ranks, way, errors, failure=RankFailure):
    return ranks(2).run(_act, way, errors, failure)


@pytest.mark.parametrize(
    ("way", "expected"), [("on_all_ranks", [0, 10]), ("from_all_ranks", [[0, 10]] * 2), ("on_rank_zero", [0, 0])]
)
def test_results(ranks, way, expected):
    assert _outcomes(ranks, way, {}) == expected


@pytest.mark.parametrize("way", ["on_all_ranks", "from_all_ranks"])
@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ({1: ValueError("no such file")}, "no such file"),
        ({0: OSError("disk full"), 1: OSError("disk full")}, "disk full"),
        ({0: ValueError("this"), 1: _Odd("that")}, "rank 0: this; rank 1: _Odd: that"),
        ({0: FailedElsewhere(), 1: ValueError("the reason")}, "the reason"),
        ({1: _Odd()}, "_Odd: _Odd"),
    ],
    ids=["one rank", "all alike", "two reasons", "one reason is another rank's", "no text"],
)
def test_one_error_everywhere(ranks, way, errors, message):
    assert _outcomes(ranks, way, errors) == [(RankFailure, message)] * 2


def test_only_rank_zero_acts(ranks):
    assert _outcomes(ranks, "on_rank_zero", {1: ValueError("never raised")}) == [0, 0]
    assert _outcomes(ranks, "on_rank_zero", {0: _Odd("gone")}) == [(RankFailure, "_Odd: gone")] * 2


def test_the_error_is_of_the_kind_that_was_asked_for(ranks):
    assert _outcomes(ranks, "on_all_ranks", {1: _Odd("it")}, _Odd) == [(_Odd, "it")] * 2
    assert _outcomes(ranks, "on_rank_zero", {0: ValueError("it")}, ValueError) == [(ValueError, "it")] * 2


@pytest.mark.parametrize("way", WAYS)
def test_a_process_alone_needs_no_group(way, monkeypatch):
    """As a tool or a test calls it, before any process group exists."""
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    assert WAYS[way](lambda: 3) == ([3] if way == "from_all_ranks" else 3)

    def fail():
        raise ValueError("it")

    with pytest.raises(RankFailure, match=r"^it$") as caught:
        WAYS[way](fail)
    assert isinstance(caught.value.__cause__, ValueError)


def test_sigterm_ends_the_rank_and_is_no_failure_to_agree_on():
    """A rank that torchrun ends must not wait for the others, and a caller that handles failures must not go on."""
    from megatron_tropd.parallel.job_end import End, JobEnd, Terminated

    def action():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(3000):  # the handler runs in this thread, perhaps a little later
            time.sleep(0.01)

    def command():
        with pytest.raises(Terminated, match="SIGTERM"):
            on_all_ranks(action)
        return 0

    assert JobEnd(lambda error: End(text=str(error), exit_code=1, summary="")).run(command) == 0


@pytest.mark.parametrize(
    ("error", "level"), [(ValueError("a user's mistake"), logging.DEBUG), (KeyError("a bug"), logging.ERROR)]
)
def test_the_traceback_of_a_bug_is_logged(error, level, caplog):
    def action():
        raise error

    caplog.set_level(logging.DEBUG)
    with pytest.raises(RankFailure):
        on_all_ranks(action)
    assert [(record.levelno, record.exc_info[1]) for record in caplog.records] == [(level, error)]
