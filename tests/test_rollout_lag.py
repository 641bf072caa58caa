"""--rollout-lag 1: the batch that is trained was written by the weights before the last update."""

from __future__ import annotations

import pytest
import torch

from tests.test_training_oracle import _gradient, _logprobs, _model
from tests.tiny_run import flags, make_world, reports_here

TOTAL, STOP = 5, 3
CAP = 1.5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _numbers(reports):
    """What does not depend on time."""
    return [
        (r.loss, r.grad_norm, {name: v for name, v in r.metrics.items() if not name.startswith("engine/")})
        for r in reports
    ]


def _lagging_step(argv):
    """Weights after the first update (by HF name), and the report and rollouts of the second step."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    try:
        push_weights(assembled.run)
        train_step(assembled.run, 0)
        weights = {name: tensor.clone() for name, tensor in assembled.run.export()}
        report, trained = train_step(assembled.run, 1)
        return weights, report, trained.rollouts
    finally:
        close(assembled)


@pytest.mark.parametrize(
    ("size", "layout"),
    [(1, {}), (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}), (2, {})],
    ids=["TP1", "TP2", "DP2"],
)
def test_the_gradient_is_that_of_importance_sampling_in_float64(ranks, world, tmp_path, size, layout, measured):
    """K1 with the reward log q - log p of the current student, weighted by min(p / mu, cap), mu being the probability
    by the weights that wrote the token."""
    argv = flags(
        world,
        tmp_path / "run",
        objective="opd",
        rollout_lag=1,
        train_iters=3,
        lr=5e-2,
        tis_cap=CAP,
        clip_grad=0.0,
        **layout,
    )
    weights, report, rollouts = ranks(size).run(_lagging_step, argv)[0]
    assert {rollout.weight_version for rollout in rollouts} == {(0, 0)} and report.metrics["rollout/lag_mean"] == 1
    before, now, teacher = (_model(world / name) for name in ("student", "student", "teacher"))
    now.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    loss, count, ratios = 0.0, 0, []
    for rollout in rollouts:
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])[:, None]
        own = _logprobs(now, rollout).gather(1, labels)[:, 0]
        with torch.no_grad():
            log_q, log_mu = (_logprobs(model, rollout).gather(1, labels)[:, 0] for model in (teacher, before))
        ratio = (own.detach() - log_mu).exp()
        ratios.append(ratio)
        loss -= ((log_q - own.detach()) * ratio.clamp(max=CAP) * (own - own.detach()).exp()).sum()
        count += len(labels)
    all_ratios = torch.cat(ratios)
    assert all_ratios.min() < 0.9 and all_ratios.max() > CAP, "the weights moved, and the cap is met"
    norm = float(_gradient(now, loss / count).norm())
    errors = [abs(report.loss / float(loss.detach() / count) - 1), abs(report.grad_norm / norm - 1)]
    measured("lag 1: loss and gradient norm equal importance sampling in float64", max(errors), 1e-4)
    ratio_mean = report.metrics["importance/ratio_mean"]
    assert ratio_mean == pytest.approx(float(all_ratios.mean()), rel=1e-4)


def test_with_learning_rate_0_it_is_the_run_without_lag(ranks, world, tmp_path, measured):
    """1e-30, because 0 is refused: no weight changes."""
    curves = [
        _numbers(ranks(2).run(reports_here, flags(world, tmp_path / str(lag), rollout_lag=lag, lr=1e-30))[0])
        for lag in (0, 1)
    ]
    worst = max(
        abs(a - b) / abs(b)
        for mine, theirs in zip(*curves, strict=True)
        for a, b in zip(mine[:2], theirs[:2], strict=True)
    )
    measured("lag 1 with learning rate 0: loss and gradient norm equal those of lag 0 (relative)", worst, 1e-6)


def test_lag_changes_what_is_trained(ranks, world, tmp_path):
    """Negative control: with a learning rate the second step differs, the first does not."""
    curves = [
        _numbers(ranks(1).run(reports_here, flags(world, tmp_path / str(lag), rollout_lag=lag, lr=1e-2))[0])
        for lag in (0, 1)
    ]
    assert curves[1][0][:2] == pytest.approx(curves[0][0][:2], rel=1e-6)
    assert curves[1][1][0] != pytest.approx(curves[0][1][0], rel=1e-4)


@pytest.mark.parametrize(
    ("size", "changes"),
    [(1, {}), (2, {"tensor_model_parallel_size": 2}), (2, {"num_minibatches": 2, "use_distributed_optimizer": True})],
    ids=["TP1", "TP2", "DP2, two minibatches"],
)
def test_a_resumed_run_goes_on_exactly(ranks, world, tmp_path, size, changes):
    """The batch that was written and not trained on is in the checkpoint, with the log-probabilities of its weights."""
    settings = {"rollout_lag": 1, "train_iters": TOTAL, "lr": 1e-2, **changes}
    whole = ranks(size).run(reports_here, flags(world, tmp_path / "whole", **settings))[0]
    argv = flags(world, tmp_path / "run", save_interval=STOP, **settings)
    first = ranks(size).run(reports_here, argv, STOP)[0]
    rest = ranks(size).run(reports_here, argv)[0]
    assert _numbers(first + rest) == _numbers(whole)
    assert [r.metrics["rollout/lag_mean"] for r in rest] == [float(settings.get("num_minibatches", 1))] * 2


def test_a_run_that_gives_up_the_lag_writes_the_batch_anew(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", save_interval=STOP, train_iters=TOTAL, rollout_lag=1, lr=1e-2)
    ranks(1).run(reports_here, argv, STOP)
    strict = flags(
        world, tmp_path / "run", save_interval=STOP, train_iters=TOTAL, rollout_lag=0, lr=1e-2, allow_changed_run=True
    )
    reports = ranks(1).run(reports_here, strict)[0]
    assert [report.step for report in reports] == [4, 5]
    assert all(report.metrics["rollout/lag_mean"] == 0 for report in reports)
