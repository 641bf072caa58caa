"""Finite but absurd numbers are an alarm before a weight moves; healthy runs never come near the limits."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_tropd.config import TrainingConfig
from megatron_tropd.training.guard import (
    MAX_SKIPS_IN_A_ROW,
    BadUpdate,
    Guard,
    NonFiniteStep,
    SpikeStep,
    Update,
)
from megatron_tropd.training.step import mean_logprobs
from tests.tiny_run import flags, make_world, reports_here
from tests.torchrun_jobs import output_of

GOOD = {"step": 7, "loss": 3.0, "grad_norm": 5.0}
MINUS_INF = -math.inf


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"loss": -1.1e33}, r"loss is -1\.1e\+33, beyond --spike-limit 200; no weight.*--lr is probably too high"),
        ({"grad_norm": 5e13}, r"gradient norm is 5e\+13, beyond --spike-grad-norm 1e\+06.*--lr"),
        ({"logprobs": {"teacher": -1e33}, "loss": 1e33}, r"by the teacher is -1e\+33.*--teacher-hf-checkpoint or --teacher-load"),
        ({"logprobs": {"teacher": MINUS_INF}}, r"by the teacher is -inf, beyond --spike-limit"),
        ({"logprobs": {"teacher": -9.0, "reference": -300.0}}, r"by the reference is -300.*--reference-load"),
        ({"logprobs": {"student": -900.0}}, r"by the student is -900.*--lr"),
        ({"reward": 2e6}, r"largest absolute reward is 2e\+06, beyond --spike-reward 1e\+06.*--reward-function"),
    ],
)  # fmt: skip
def test_each_number_has_a_limit_a_cause_and_a_flag(numbers, message):
    with pytest.raises(SpikeStep, match=rf"^step 7: .*{message}.*--on-spike skip"):
        Guard(TrainingConfig(), print).judge(Update(**{**GOOD, **numbers}))
    said = []
    assert Guard(TrainingConfig(on_spike="warn"), said.append).judge(Update(**{**GOOD, **numbers})) == "stepped"
    assert len(said) == 1 and said[0].startswith("warning: step 7: ")


def test_a_nan_after_an_absurd_teacher_blames_the_teacher():
    update = Update(step=1, loss=1.0, grad_norm=math.nan, logprobs={"teacher": -1e33})
    message = r"the teacher is -1e\+33.* and gradient norm is nan; .*--teacher-hf-checkpoint"
    with pytest.raises(SpikeStep, match=message):
        Guard(TrainingConfig(), print).judge(update)
    assert Guard(TrainingConfig(on_spike="skip"), print).judge(update) == "skipped"
    with pytest.raises(NonFiniteStep, match="gradient norm is nan"):
        Guard(TrainingConfig(on_spike="warn"), print).judge(update)


def test_limits_are_flags_and_healthy_numbers_are_silent():
    said = []
    guard = Guard(TrainingConfig(), said.append)
    healthy = {"loss": -150.0, "grad_norm": 9e5, "logprobs": {"teacher": -150.0}, "reward": 9e5}
    assert guard.judge(Update(**{**GOOD, **healthy})) == "stepped" and not said
    with pytest.raises(SpikeStep, match="beyond --spike-limit 100"):
        Guard(TrainingConfig(spike_limit=100.0), print).judge(Update(**{**GOOD, **healthy}))
    unlimited = TrainingConfig(spike_limit=1e300, spike_grad_norm=1e300)
    assert Guard(unlimited, said.append).judge(Update(**{**GOOD, "loss": 1e33, "grad_norm": 1e30})) == "stepped"


def test_skips_have_a_budget():
    guard = Guard(TrainingConfig(on_spike="skip"), print)
    for _ in range(MAX_SKIPS_IN_A_ROW):
        assert guard.judge(Update(**{**GOOD, "loss": 1e9})) == "skipped"
    with pytest.raises(SpikeStep, match="update 11 in a row"):
        guard.judge(Update(**{**GOOD, "loss": 1e9}))


def test_the_message_does_not_deny_the_updates_before_it():
    with pytest.raises(SpikeStep, match=r"this update changed no weight, but the 2 before it in the same step did"):
        Guard(TrainingConfig(), print).judge(Update(**{**GOOD, "loss": 1e9, "stepped_before": 2}))


def test_a_teacher_that_excludes_most_tokens_is_an_alarm():
    assert mean_logprobs({"teacher/logprob_mean": -3.0, "teacher/excluded_frac": 0.1}) == {"teacher": -3.0}
    assert mean_logprobs({"teacher/excluded_frac": 1.0}) == {"teacher": MINUS_INF}


# Whole steps -------------------------------------------------------------------------------------


def _flip(model):
    """Flip the top exponent bit of one output weight, on the rank that holds it: a small one, which stays finite."""
    row = model.lm_head_weight().data[40]
    row.view(torch.int32)[row.abs().argmin()] ^= 1 << 30


def _damaged_step(argv, role):
    """One step with a model whose weight flipped in memory: (verdict or error, did a weight move, version)."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    run = assembled.run
    scorer = getattr(run, role).scorer._scorer._model
    try:
        push_weights(run)
        if scorer._groups.is_last_stage and scorer._groups.coords.tp == 0:
            _flip(scorer._model)
        before = [p.detach().clone() for p in run.student.model.parameters()]
        try:
            verdict = train_step(run, 0)[0].verdict
        except SpikeStep as error:
            verdict = str(error)
        moved = any(not torch.equal(a, b) for a, b in zip(before, run.student.model.parameters(), strict=True))
        return verdict, moved, run.student.version
    finally:
        close(assembled)


LAYOUTS = [
    {"tensor_model_parallel_size": 2, "teacher_tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "teacher_pipeline_model_parallel_size": 2},
    {},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["TP2", "PP2", "DP2"])
@pytest.mark.parametrize("role", ["teacher", "reference"])
@pytest.mark.fault(number=14)
def test_a_bit_that_flips_in_memory_moves_no_weight_on_any_rank(ranks, world, tmp_path, layout, role):
    changes = {"objective": "gopd", "reference_hf_checkpoint": world / "student"} if role == "reference" else {}
    argv = flags(world, tmp_path / "run", **layout, **changes)
    outcomes = ranks(2).run(_damaged_step, argv, role)
    assert outcomes[0] == outcomes[1]
    message, moved, version = outcomes[0]
    assert message.startswith("step 1: ") and f"mean log-probability by the {role} is -" in message
    assert "no weight was changed by this step" in message and f"--{role}-hf-checkpoint" in message
    assert not moved and version == 0
    skipped = ranks(2).run(_damaged_step, [*argv, "--on-spike", "skip"], role)
    assert skipped == [("skipped", False, 0)] * 2


def _error(argv):
    try:
        reports_here(argv)
    except BadUpdate as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("objective", ["tropd", "sft", "full_fkl"])
@pytest.mark.fault(number=14)
def test_a_learning_rate_of_10_ends_the_run(ranks, world, tmp_path, objective):
    (error,) = ranks(1).run(_error, flags(world, tmp_path / "run", objective=objective, lr=10, on_parity="warn"))
    assert error.startswith(("SpikeStep: step 2: ", "NonFiniteStep: step 2: ")) and "lower --lr" in error


def test_later_updates_of_a_step_say_what_the_earlier_did(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", lr=10, num_minibatches=2, on_parity="warn")
    (error,) = ranks(1).run(_error, argv)
    assert error.startswith("SpikeStep: step 1: ")
    assert "the 1 before it in the same step did (--num-minibatches)" in error
    assert "no weight was changed" not in error


def test_absurd_rewards_end_the_run(ranks, world, tmp_path):
    changes = {"objective": "grpo", "reward_function": "tests.reward_functions:astronomic"}
    (error,) = ranks(1).run(_error, flags(world, tmp_path / "run", **changes))
    assert error.startswith("SpikeStep: step 1: ") and "--reward-function" in error


@pytest.mark.slow
def test_the_exit_code_of_the_command(world, tmp_path):
    argv = flags(world, tmp_path / "run", lr=10, on_parity="warn")
    text = output_of(argv, tmp_path)
    assert f"exitcode  : {SpikeStep.exit_code}" in text
    assert text.count("step 2: loss is ") == 1 and "SpikeStep:" not in text
