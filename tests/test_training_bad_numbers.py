"""Numbers that no step may be made of: found before any gradient, on every rank alike, with the prompt's name."""

from __future__ import annotations

import dataclasses

import pytest

from tests.hf_models import read_tensors, write_tensors
from tests.tiny_run import flags, make_world, reports_here

LAYOUT = {"pipeline_model_parallel_size": 2, "teacher_tensor_model_parallel_size": 2}


class _Spoiling:
    """A teacher that loses one number of one rollout on the way."""

    def __init__(self, teacher, value):
        self._teacher, self._value, self.hidden_like = teacher, value, teacher.hidden_like

    def scores(self, step, rollouts, want, destination):
        scores = self._teacher.scores(step, rollouts, want, destination)
        if 5 in scores:
            scores[5].logprob[-1] = self._value
        return scores

    def metrics(self):
        return self._teacher.metrics()


def _spoiled_step(argv, value):
    """(what stopped the step, did a weight move, the prompt)."""
    import torch
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    scoring = assembled.run.teacher
    spoiling = dataclasses.replace(scoring, scorer=_Spoiling(scoring.scorer, value))
    run = dataclasses.replace(assembled.run, teacher=spoiling)
    try:
        push_weights(run)
        before = [p.detach().clone() for p in run.student.model.parameters()]
        try:
            report, _ = train_step(run, 0)
            outcome = report.loss
        except ValueError as error:
            outcome = str(error)
        moved = any(not torch.equal(a, b) for a, b in zip(before, run.student.model.parameters(), strict=True))
        return outcome, moved
    finally:
        close(assembled)


def _message(argv):
    try:
        reports_here(argv)
    except ValueError as error:
        return str(error)
    return ""


def _message_of_a_step_with_nan_weights(argv, role):
    """The weights become NaN after the checks at the start."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    try:
        push_weights(assembled.run)
        model = getattr(assembled.run, role).scorer._scorer._model._model
        model.decoder.layers[0].mlp.linear_fc2.weight[0, 0] = float("nan")
        train_step(assembled.run, 0)
    except ValueError as error:
        return str(error)
    finally:
        close(assembled)
    return ""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_nan_from_a_teacher_stops_every_rank_before_a_weight_moves(ranks, world, tmp_path):
    for message, moved in ranks(2).run(_spoiled_step, flags(world, tmp_path / "run", **LAYOUT), float("nan")):
        assert "teacher_logprob_T: 1 of" in message and "of prompt" in message and "sample 1: nan" in message
        assert not moved


def test_a_token_the_teacher_excludes_is_never_trusted_and_trains(ranks, world, tmp_path):
    for loss, moved in ranks(2).run(_spoiled_step, flags(world, tmp_path / "run", **LAYOUT), -float("inf")):
        assert loss == loss and abs(loss) < 1e3 and moved


@pytest.mark.parametrize("role", ["teacher", "reference"])
def test_a_scorer_with_nan_weights_names_the_prompts(ranks, world, tmp_path, role):
    argv = flags(world, tmp_path / "run", objective="gopd", reference_hf_checkpoint=world / "student", **LAYOUT)
    messages = ranks(2).run(_message_of_a_step_with_nan_weights, argv, role)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{role}: prompts ") and f"check --{role}-hf-checkpoint" in messages[0]


def test_a_teacher_with_nan_weights_is_refused_at_the_start(ranks, world, tmp_path):
    import shutil

    shutil.copytree(world, tmp_path / "world")
    tensors = read_tensors(tmp_path / "world/teacher")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")
    write_tensors(tmp_path / "world/teacher", tensors)
    messages = ranks(2).run(_message, flags(tmp_path / "world", tmp_path / "run", **LAYOUT))
    assert messages[0] == messages[1]
    assert "gives short sequences NaN or infinite logits" in messages[0] and "--teacher-hf-checkpoint" in messages[0]
