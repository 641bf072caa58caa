"""No weight moves on a NaN, and all ranks agree."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tropd.config import TrainingConfig
from megatron_tropd.training.guard import MAX_SKIPS_IN_A_ROW, Guard, NonFiniteStep, Update
from tests.tiny_run import flags, make_world


def _guard(said=None, **settings):
    return Guard(TrainingConfig(**settings), (said if said is not None else []).append)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_stop_names_step_number_and_advice(loss, norm):
    with pytest.raises(NonFiniteStep, match=r"step 7: .*no weight was changed.*--on-nonfinite skip"):
        _guard().judge(Update(step=7, loss=loss, grad_norm=norm))


def test_skips_have_a_budget_and_a_good_step_renews_it():
    guard = _guard(on_nonfinite="skip")
    for _ in range(3):
        for step in range(MAX_SKIPS_IN_A_ROW):
            assert guard.judge(Update(step=step, loss=math.nan, grad_norm=1.0)) == "skipped"
        assert guard.judge(Update(step=99, loss=1.0, grad_norm=1.0)) == "stepped"
    for step in range(MAX_SKIPS_IN_A_ROW):
        guard.judge(Update(step=step, loss=math.nan, grad_norm=1.0))
    with pytest.raises(NonFiniteStep, match="11 in a row"):
        guard.judge(Update(step=11, loss=math.nan, grad_norm=1.0))


def _poisoned_step(argv, policy, poison=math.nan):
    """One step in which rank 1 alone has ``poison`` as its gradients; (verdict, did any weight move)."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse([*argv, "--on-nonfinite", policy]), dist.get_world_size()))
    run = assembled.run
    try:
        push_weights(run)
        if dist.get_rank() == 1:
            parameter = next(run.student.model.parameters())
            parameter.register_hook(lambda grad: torch.full_like(grad, poison))
        before = [p.detach().clone() for p in run.student.model.parameters()]
        try:
            verdict = train_step(run, 0)[0].verdict
        except NonFiniteStep:
            verdict = "stopped"
        moved = any(not torch.equal(a, b) for a, b in zip(before, run.student.model.parameters(), strict=True))
        return verdict, moved, run.student.version
    finally:
        close(assembled)


@pytest.mark.parametrize(("policy", "verdict"), [("stop", "stopped"), ("skip", "skipped")])
@pytest.mark.parametrize("layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}])
@pytest.mark.fault(number=11)
def test_a_nan_on_one_rank_moves_no_weight_on_any(ranks, tmp_path, policy, verdict, layout):
    world = make_world(tmp_path / "world")
    argv = flags(world, tmp_path / "run", **layout)
    assert ranks(2).run(_poisoned_step, argv, policy) == [(verdict, False, 0)] * 2


@pytest.mark.fault(number=12)
def test_an_infinite_gradient_on_one_stage_moves_no_weight_on_any(ranks, tmp_path):
    argv = flags(make_world(tmp_path / "world"), tmp_path / "run", pipeline_model_parallel_size=2)
    assert ranks(2).run(_poisoned_step, argv, "stop", math.inf) == [("stopped", False, 0)] * 2
