"""A step computed again from a checkpoint: the numbers that the run logged, the same gradient twice, nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_tropd.cli import ConfigError
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import output_of
from tools.replay_step import compare, config_of_replay, main, replay


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run_dir(ranks, world, tmp_path_factory):
    """A run of three steps on two ranks, with two updates in a step; the checkpoint of step 2 holds the rollouts of
    step 3."""
    run = tmp_path_factory.mktemp("runs") / "run"
    argv = flags(world, run, train_iters=3, save_interval=1, pipeline_model_parallel_size=2, num_minibatches=2)
    ranks(2).run(_train, argv)
    return run


def _train(argv):
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, save_if_due, train_step

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    run = assembled.run
    try:
        push_weights(run)
        for step in range(3):
            if step == 2:  # as a run does that is stopped before its update
                run.stream.take(step, run.student.version)
                run.checkpoints.save(step, run.student, run.source, run.stream.pending, wait=True)
            report, trained = train_step(run, step)
            run.logger.step(report, trained.rollouts, trained.tokens)
            save_if_due(run, report.step)
    finally:
        close(assembled)


def _replays(run, steps, engine="embedded"):
    """On this rank, by step: the replay, or the error, the text that compares it, and whether it is the same."""
    import torch.distributed as dist

    from megatron_tropd.setup.run_spec import make_run_spec

    found = []
    for step in steps:
        spec = make_run_spec(config_of_replay(run, step, None), dist.get_world_size())
        try:
            again = replay(spec, step, engine=engine)
        except ConfigError as error:
            found.append(str(error))
        else:
            found.append((again, *compare(run, step, again, 0.0)))
    return found


def _files(run):
    return {
        str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(run.rglob("*"))
        if path.is_file()
    }


@pytest.mark.fault(number=33)
def test_every_step_gives_the_numbers_that_the_run_logged(ranks, run_dir):
    before = _files(run_dir)
    steps = [1, 2, 3, 3]
    first, second = ranks(2).run(_replays, run_dir, steps)
    assert _files(run_dir) == before and not Path(config_of_replay(run_dir, 1, None).logging.run_dir).exists()
    for step, (again, text, same), (other, *_) in zip(steps, first, second, strict=True):
        assert same and text.count("equals the run's") == 2, text
        assert again == other and len(again.digests) == 2
        assert again.from_checkpoint == (step == 3)
    assert first[2][0] == first[3][0]
    assert len({digest for again, *_ in first for digest in again.digests}) == 6  # of three steps


def test_rollouts_of_servers_must_be_in_the_checkpoint(ranks, run_dir):
    (refused, (again, _, same)), _ = ranks(2).run(_replays, run_dir, [2, 3], "sglang")
    assert "--rollout-engine sglang" in refused and "the checkpoint of step 1 holds none" in refused
    assert same and again.from_checkpoint


def _change_the_log(run, step, factor):
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["step"] == step:
            record["loss"] *= factor
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.fault(number=33)
def test_the_command_says_that_a_step_differs(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    _change_the_log(tmp_path / "run", 3, 1 + 1e-12)
    text = output_of([str(tmp_path / "run"), "3"], tmp_path, module="tools.replay_step")
    assert "loss" in text and text.count("DIFFERS from the run's") == 1 and text.count("equals the run's") == 1
    assert "exitcode  : 1" in text and text.endswith("torchrun exited with 1")


def test_a_step_that_cannot_be_computed_is_bad_input(run_dir, tmp_path, capsys):
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iter_0000001")
    cases = {
        ("run", "2"): "STEP 2 needs the checkpoint of step 1, and",
        ("run", "0"): "STEP 0: the run has the steps 1 to 3",
        ("run", "4"): "STEP 4: the run has the steps 1 to 3",
        ("nothing", "1"): "config.yaml: No such file or directory",
    }
    for (name, step), message in cases.items():
        assert main([str(tmp_path / name), step]) == 2
        assert message in capsys.readouterr().err
