"""An update with bad numbers is computed again: a transient error leaves no trace in the weights."""

from __future__ import annotations

import pytest

from megatron_tropd.training.guard import NonFiniteStep, SpikeStep
from megatron_tropd.training.rerun import PERSISTENT, TRANSIENT
from tests.tiny_run import flags, make_world
from tools.faults.means import BadNumbers


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _train(argv, faulty_rank, kind, calls):
    """Two steps with faults in calls of the hook on one rank: (weights, numbers, metrics, microbatches, said, error)."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step
    from megatron_tropd.training.weights_digest import weights_digest

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    run, reports, said, error = assembled.run, [], [], None
    run.progress.message = said.append
    try:
        push_weights(run)
        if kind and dist.get_rank() == faulty_rank:
            BadNumbers(kind, calls).into(run.student.model.chunks[0])
        try:
            reports = [train_step(run, step)[0] for step in range(2)]
        except (NonFiniteStep, SpikeStep) as raised:
            error = (raised.exit_code, str(raised))
        metrics = [{name: value for name, value in report.metrics.items() if _repeats(name)} for report in reports]
        numbers = [(report.loss, report.grad_norm, report.verdict) for report in reports]
        return weights_digest(run.student), numbers, metrics, run.student.microbatches, said, error
    finally:
        close(assembled)


def _repeats(name):
    """Whether a metric is the same number in every launch."""
    return not name.startswith(("engine/", "memory/", "teacher/wait", "teacher/busy"))


LAYOUTS = {
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "DP2": {"num_minibatches": 2, "use_distributed_optimizer": True},
}


@pytest.mark.parametrize(
    "layout", ["TP2", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("PP2", "DP2"))]
)
@pytest.mark.fault(number=13)
def test_after_a_transient_error_every_bit_is_that_of_the_clean_run(ranks, world, tmp_path, layout):
    argv = flags(world, tmp_path / "run", **LAYOUTS[layout])
    clean = ranks(2).run(_train, argv, 1, "", ())
    for kind in ("nan", "flip", "activation"):
        found = ranks(2).run(_train, argv, 1, kind, {1})
        for (weights, numbers, metrics, microbatches, said, error), expected in zip(found, clean, strict=True):
            assert error is None
            assert metrics[0].pop(TRANSIENT) == 1 and PERSISTENT not in metrics[0]
            assert (weights, numbers, metrics, microbatches) == expected[:4]
            (line,) = [line for line in said if "transient error" in line]
            assert line.startswith("warning: step 1: transient error: an update gave ")


@pytest.mark.parametrize(
    "layout", ["DP2", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("TP2", "PP2"))]
)
@pytest.mark.fault(number=13)
def test_a_persistent_error_is_judged_and_the_message_says_that_it_was_repeated(ranks, world, tmp_path, layout):
    argv = flags(world, tmp_path / "run", **LAYOUTS[layout])
    always = range(1000)
    outcomes = ranks(2).run(_train, argv, 1, "nan", always)
    assert outcomes[0] == outcomes[1]
    code, text = outcomes[0][-1]
    assert code == 17 and "gradient norm is nan; computed again" in text
    assert "gave the same numbers: a persistent error" in text and "no weight was changed by this step" in text
    skipped = ranks(2).run(_train, [*argv, "--on-nonfinite", "skip"], 1, "nan", always)
    updates = LAYOUTS[layout].get("num_minibatches", 1)
    for _, numbers, metrics, *_ in skipped:
        assert [one[2] for one in numbers] == ["skipped"] * 2
        assert [one[PERSISTENT] for one in metrics] == [updates] * 2


def test_another_fault_in_the_second_pass_is_no_success(ranks, world, tmp_path):
    """And without the flag nothing is computed twice."""
    argv = flags(world, tmp_path / "run", max_tokens_per_microbatch=512)  # one micro-batch an update
    ((*_, (code, text)),) = ranks(1).run(_train, argv, 0, "large", {0, 1})
    assert code == 18 and "a persistent error" in text
    ((*_, (code, text)),) = ranks(1).run(_train, [*argv, "--no-rerun-on-nonfinite"], 0, "nan", {0})
    assert code == 17 and "computed again" not in text
    ((*_, error),) = ranks(1).run(_train, [*argv, "--on-spike", "warn"], 0, "large", {0})
    assert error is None
