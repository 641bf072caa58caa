"""Runs that die or stop after scoring: the next launch asks no frozen model again, whatever the placement or layout."""

from __future__ import annotations

import dataclasses
import json
import os
from contextlib import closing
from functools import partial

import pytest

from megatron_tropd.training.spool import FOLDER
from tests.ranks import RankPool, serve
from tests.sglang_helpers import needs_sglang
from tests.teacher_servers import serving
from tests.tiny_run import add_second_teacher, flags, make_world

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = make_world(tmp_path_factory.mktemp("world"))
    add_second_teacher(root)
    return root


class _Dies(RuntimeError):
    """As a lost rank ends the others: nothing is saved."""


def _launch(argv, how=""):
    """On this rank: calls of each frozen model, what was printed and the steps, until ``how`` (stop, die) after the
    scoring of the first step."""
    import contextlib
    import io

    from megatron_tropd.cli import parse
    from megatron_tropd.parallel.stop_request import StopRequest
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.teacher.megatron import MegatronTeacher
    from megatron_tropd.teacher.server.scorer import ServerScorer
    from megatron_tropd.training.guard import BadUpdate
    from megatron_tropd.training.loop import push_weights, train_step
    from megatron_tropd.training.stopping import Stopped, Stopping

    class AfterScoring(Stopping):
        asked = 0

        def why(self, steps_done=None):
            self.asked += 1
            if self.asked == 2 and how == "die":
                raise _Dies
            return "SIGTERM" if (self.asked, how) in ((2, "stop"), (4, "stop later")) else None

        def obeyed(self, why):
            pass

    calls, printed, steps, error = [], io.StringIO(), [], ""
    whole_score, server_score = MegatronTeacher.score, ServerScorer._score

    def score(self, *args):
        calls.append(self._role)
        return whole_score(self, *args)

    def ask(self, *args):
        calls.append("server")
        return server_score(self, *args)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(MegatronTeacher, "score", score)
        patch.setattr(ServerScorer, "_score", ask)
        assembled = assemble(make_run_spec(parse(argv), int(os.environ["WORLD_SIZE"])))
        run = dataclasses.replace(assembled.run, stopping=AfterScoring(assembled.run.config, StopRequest(), 0.0))
        try:
            push_weights(run)
            for step in range(assembled.start_step, run.config.training.train_iters):
                report, _ = train_step(run, step)
                steps.append((report.step, report.loss, report.grad_norm))
        except (Stopped, _Dies, BadUpdate) as ended:
            error = type(ended).__name__
        finally:
            close(assembled)
    return calls, printed.getvalue(), steps, error


TP2 = {"tensor_model_parallel_size": 2}


def _run(ranks, argv, how=""):
    """Of both ranks: calls, text of rank 0, steps, error."""
    (calls, text, steps, error), (there, _, same, error_there) = ranks(2).run(_launch, argv, how)
    assert steps == same and error == error_there
    return calls + there, text, steps, error


def _left(run_dir):
    return sorted(path.suffix for path in (run_dir / FOLDER).glob("*"))


@pytest.mark.parametrize(
    "changes",
    [
        {**TP2, "objective": "gopd"},
        {"rollout_max_batch_size": 3},
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.thorough),
        pytest.param({"context_parallel_size": 2}, marks=pytest.mark.thorough),
    ],
    ids=["TP2, reference", "DP2", "PP2", "CP2"],
)
def test_a_run_that_dies_after_scoring_does_not_score_again(ranks, world, tmp_path, changes):
    changes = {**changes, "train_iters": 1}
    _, _, whole, _ = _run(ranks, flags(world, tmp_path / "whole", **changes))
    argv = flags(world, tmp_path / "run", **changes)
    calls, text, steps, error = _run(ranks, argv, "die")
    assert calls and not steps and error == "_Dies" and "earlier launch" not in text
    assert set(_left(tmp_path / "run")) == {".rollouts", ".scores"}
    calls, text, steps, _ = _run(ranks, argv)
    assert not calls and "step 1: the teacher scored 8 of 8 rollouts in an earlier launch" in text, text
    assert ("the reference scored 8 of 8" in text) == ("objective" in changes)
    assert steps == whole, "bit for bit"
    assert not _left(tmp_path / "run")


def test_a_run_that_was_stopped_goes_on_with_its_scores_on_another_layout(ranks, world, tmp_path):
    _, text, steps, error = _run(ranks, flags(world, tmp_path / "run", train_iters=1, **TP2), "stop")
    assert error == "Stopped" and not steps and ".scores" in _left(tmp_path / "run")
    calls, text, steps, _ = _run(ranks, flags(world, tmp_path / "run", train_iters=1))
    assert not calls and len(steps) == 1 and "the teacher scored 8 of 8 rollouts" in text
    assert not _left(tmp_path / "run")


def test_scores_of_another_teacher_or_of_a_refused_update_are_not_used(ranks, world, tmp_path):
    other = {**TP2, "train_iters": 1, "teacher_hf_checkpoint": world / "second"}
    _, _, whole, _ = _run(ranks, flags(world, tmp_path / "whole", **other))
    _run(ranks, flags(world, tmp_path / "run", train_iters=1, **TP2), "die")
    calls, text, steps, _ = _run(ranks, flags(world, tmp_path / "run", **other))
    assert set(calls) == {"teacher"} and "the teacher scored" not in text and "8 of 8 rollouts were finished" in text
    assert steps == whole, "that of a run with this teacher"
    calls, text, _, error = _run(ranks, flags(world, tmp_path / "bad", train_iters=1, spike_limit=1e-6, **TP2))
    assert error == "SpikeStep" and calls and not _left(tmp_path / "bad"), "the next launch would fail of them again"


@pytest.mark.thorough
@pytest.mark.servers
@needs_sglang
def test_servers_scores_are_kept_as_they_come(ranks, world, tmp_path):
    with serving(world / "second", tmp_path / "servers", 1) as (server,):
        changes = {**TP2, "train_iters": 1, "teacher_hf_checkpoint": world / "second", "teacher_placement": "server"}
        argv = [*flags(world, tmp_path / "run", **changes), "--teacher-urls", server.url]
        calls, _, _, error = _run(ranks, argv, "die")
        assert calls == ["server"] * 8 and error == "_Dies" and ".scores" in _left(tmp_path / "run")
        calls, text, steps, _ = _run(ranks, argv)
    assert not calls and len(steps) == 1 and "the teacher scored 8 of 8 rollouts" in text
    assert not _left(tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["stop", "stop later"])
def test_under_a_lag_the_batch_that_was_saved_is_not_scored_again(ranks, world, tmp_path, how):
    argv = flags(world, tmp_path / "run", train_iters=3, rollout_lag=1, **TP2)
    _, _, whole, _ = _run(ranks, flags(world, tmp_path / "whole", train_iters=3, rollout_lag=1, **TP2))
    before, _, made, error = _run(ranks, argv, how)
    assert error == "Stopped"
    calls, text, steps, _ = _run(ranks, argv)
    assert "the teacher scored 8 of 8 rollouts in an earlier launch" in text
    assert len(before) + len(calls) == 2 * 3, "each batch once, on both ranks"
    assert made + steps == whole and not _left(tmp_path / "run")


def _in_job(argv, how, number):
    """As :func:`_launch`, of a job whose last rank is a dedicated teacher's; there, the batches that it scored."""
    from megatron_tropd.cli import parse
    from megatron_tropd.parallel.roles import TRAINER, job_of_environment
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.setup.teacher_world import make_worker
    from megatron_tropd.teacher.megatron import MegatronTeacher

    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # names of the store are new, as after torchrun's restart
    spec = make_run_spec(parse(argv), int(os.environ["WORLD_SIZE"]))
    job = job_of_environment(spec.roles)
    if job.role.name == TRAINER:
        return _launch(argv, how)
    scored, score_here = [], MegatronTeacher.score_here

    def counted(self, rollouts, want):
        scored.extend(rollouts)
        return score_here(self, rollouts, want)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MegatronTeacher, "score_here", counted)
        make_worker(spec, job).serve()
    return scored


@pytest.mark.thorough
def test_a_dedicated_teacher_is_not_asked_again(world, tmp_path):
    changes = {"train_iters": 1, "teacher_placement": "dedicated", "teacher_world_size": 1}
    with closing(RankPool(2, serve=partial(serve, teacher_ranks=1))) as pool:
        (_, _, whole, _), scored = pool.run(_in_job, flags(world, tmp_path / "whole", **changes), "", 0)
        assert sorted(scored) == list(range(8))
        argv = flags(world, tmp_path / "run", **changes)
        (_, _, steps, error), scored = pool.run(_in_job, argv, "die", 1)
        assert error == "_Dies" and not steps and sorted(scored) == list(range(8))
        (_, text, steps, _), scored = pool.run(_in_job, argv, "", 2)
    assert not scored and "the teacher scored 8 of 8 rollouts in an earlier launch" in text
    assert steps == whole and not _left(tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.parametrize("share", ["domains: [{}]", "weight: 0.5"], ids=["by domain", "mixture"])
def test_each_of_several_teachers_is_asked_once(ranks, world, tmp_path, share):
    """That one of them is another model is noticed, and only it is asked again."""
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({**row, "domain": ("math", "code")[i % 2]}) + "\n" for i, row in enumerate(rows))
    )

    def argv(run, **models):
        files = []
        for name, model in models.items():
            files.append(tmp_path / f"{run}_{name}.yaml")
            files[-1].write_text(f"{share.format(name)}\nteacher-hf-checkpoint: {world / model}\n")
            files[-1] = files[-1].rename(tmp_path / f"{name}.yaml")
        changes = {"teacher_hf_checkpoint": None, "prompt_data": data, "train_iters": 1, **TP2}
        return [*flags(world, tmp_path / run, **changes), "--teacher-config", *map(str, files)]

    both = {"math": "teacher", "code": "second"}
    _, _, whole, _ = _run(ranks, argv("whole", **both))
    calls, _, _, error = _run(ranks, argv("run", **both), "die")
    assert error == "_Dies" and len(calls) == 4, "each on both ranks"
    again, text, steps, _ = _run(ranks, argv("run", **both))
    assert not again and text.count("in an earlier launch") == 2, text
    assert steps == whole and not _left(tmp_path / "run")
    _run(ranks, argv("other", **both), "die")
    again, text, _, _ = _run(ranks, argv("other", math="teacher", code="teacher"))
    assert len(again) == 2 and len(set(again)) == 1 and text.count("in an earlier launch") == 1, text
