"""Scoring that fails for good: the rollouts are saved, and the same command goes on from them."""

from __future__ import annotations

import os
import signal

import pytest

from megatron_tropd.teacher.scorer import ScorerError
from tests.sglang_helpers import needs_sglang
from tests.teacher_servers import serving
from tests.tiny_run import flags, make_world, reports_here
from tests.torchrun_jobs import start, wait_for_steps

pytestmark = [pytest.mark.slow, pytest.mark.servers, needs_sglang]

TOTAL = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), teacher="qwen3")


def _argv(world, run_dir, urls, **changes):
    argv = flags(world, run_dir, teacher_placement="server", train_iters=TOTAL, sglang_start_timeout=4, **changes)
    return [*argv, "--teacher-urls", *urls]


def _until_it_fails(argv, victim, last_step):
    """On this rank: ``last_step`` steps, and what follows when the server ``victim`` is killed: reports, error, and the
    batch that was not scored."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    run, reports = assembled.run, []
    try:
        push_weights(run)
        with pytest.raises(ScorerError) as error:
            for step in range(TOTAL):
                if step == last_step:
                    dist.barrier()
                    if dist.get_rank() == 0:
                        os.killpg(victim, signal.SIGKILL)
                    dist.barrier()
                reports.append(train_step(run, step)[0])
        return reports, str(error.value), run.stream.pending.step, run.stream.pending.rollouts
    finally:
        close(assembled)


def _pending_then_the_rest(argv):
    """On this rank: the rollouts with which a run resumes, and its reports."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    pending = assembled.run.stream.pending
    close(assembled)
    return pending.step, pending.rollouts, reports_here(argv)


def _numbers(reports):
    return [(report.step, report.loss, report.grad_norm) for report in reports]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("killed_before", "fails_in", "changes"),
    [
        (2, {2, 3}, {"rollout_lag": 1}),
        (0, {0}, {"tensor_model_parallel_size": 2}),
    ],
    ids=["DP2, lag 1", "TP2, the first step"],
)
@pytest.mark.fault(number=22)
def test_a_run_goes_on_from_the_rollouts_that_it_could_not_score(
    ranks, world, tmp_path, measured, killed_before, fails_in, changes
):
    whole = ranks(2).run(reports_here, flags(world, tmp_path / "whole", train_iters=TOTAL, **changes))[0]
    with serving(world / "teacher", tmp_path / "first", 1) as (server,):
        argv = _argv(world, tmp_path / "run", [server.url], **changes)
        found = ranks(2).run(_until_it_fails, argv, server.pid, killed_before)
    first, message, failed, unscored = found[0]
    assert failed == len(first) and failed in fails_in  # with a lag, the batch of step 2 may have been scored before
    assert found[1][1] == message, "every rank gets the same error"
    assert f"The rollouts of step {failed + 1} are saved" in message and "no SGLang teacher server is left" in message
    with serving(world / "teacher", tmp_path / "second", 1) as (server,):
        argv = _argv(world, tmp_path / "run", [server.url], **changes)
        step, kept, rest = ranks(2).run(_pending_then_the_rest, argv)[0]
    assert step == failed and list(kept) == list(unscored)
    mine, theirs = _numbers(first + rest), _numbers(whole)
    assert [step for step, *_ in mine] == [step for step, *_ in theirs]
    worst = max(
        abs(a - b) / abs(b) for m, t in zip(mine, theirs, strict=True) for a, b in zip(m[1:], t[1:], strict=True)
    )
    measured("a run that goes on from kept rollouts equals the uninterrupted one (relative)", worst, 1e-5)


@pytest.mark.fault(number=22)
@pytest.mark.thorough
def test_the_command_says_that_the_run_goes_on_from_them(world, tmp_path):
    with serving(world / "teacher", tmp_path / "servers", 1) as (server,):
        argv = _argv(world, tmp_path / "run", [server.url])
        with start(argv, tmp_path) as job:
            wait_for_steps(tmp_path / "run" / "metrics.jsonl", 1, job, timeout=400)
            os.killpg(server.pid, signal.SIGKILL)
            assert job.wait(timeout=400) == 1
    assert "are saved, with the state before the step: the same command scores them" in job.output, job.output[-4000:]
    assert "Run the same command again" in job.output
    assert (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
