"""A run that is asked to stop saves first, wherever it is in a step, and the same command goes on bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from contextlib import closing
from functools import partial

import psutil
import pytest

from megatron_tropd.config import LoggingConfig, TrainConfig
from megatron_tropd.parallel.stop_request import StopRequest
from megatron_tropd.training.stopping import STOP_FILE, Stopping, stopped_file
from tests.ranks import RankPool, serve
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import start, wait_for_steps

pytestmark = pytest.mark.slow

TOTAL = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


class _AtQuestion(Stopping):
    """Asked on rank 0 to stop when the run looks the n-th time, as by a signal that arrives just before."""

    def __init__(self, config, number):
        super().__init__(config, StopRequest(), 0.0)
        self.left = number

    def _why_here(self, steps_done):
        import torch.distributed as dist

        self.left -= 1
        return "SIGTERM" if self.left == 0 and dist.get_rank() == 0 else super()._why_here(steps_done)


def _launch(argv, number=None):
    """On this rank: the text with which the run stopped; and its logged steps and weights when it did not."""
    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import train
    from megatron_tropd.training.stopping import Stopped

    assembled = assemble(make_run_spec(parse(argv), int(os.environ["WORLD_SIZE"])))
    run, text = assembled.run, ""
    if number:
        run = dataclasses.replace(run, stopping=_AtQuestion(run.config, number))
    try:
        train(run, assembled.start_step)
    except Stopped as stopped:
        text = str(stopped)
    finally:
        weights = {name: tensor.double().sum().item() for name, tensor in run.export()}
        close(assembled)
    return text, weights


def _curve(run_dir):
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"]) for r in records if r["kind"] == "step"]
    evals = sorted((r["step"], r["decoding"], r["accuracy"]) for r in records if r["kind"] == "eval")
    return steps, evals


@pytest.fixture(scope="module")
def unbroken(ranks, world, tmp_path_factory):
    """By layout: curve and weights of a run that nothing stops."""
    found = {}

    def of(**changes):
        key = repr(changes)
        if key not in found:
            run_dir = tmp_path_factory.mktemp("unbroken") / "run"
            found[key] = ranks(2).run(_launch, _argv(world, run_dir, **changes))[0], _curve(run_dir)
        return found[key]

    return of


def _argv(world, run_dir, **changes):
    return flags(world, run_dir, train_iters=TOTAL, eval_data=world / "eval.jsonl", eval_interval=1, **changes)


TP2 = {"tensor_model_parallel_size": 2}
SFT = {"objective": "sft", "teacher_hf_checkpoint": None}


def _case(name, number, what, changes, *marks):
    return pytest.param(number, what, changes, id=name, marks=marks)


MID_STEP = "the rollouts of step {}, with the state before it, are saved"
STEP = "the state after step {} is saved"
THOROUGH = pytest.mark.thorough


@pytest.mark.parametrize(
    ("number", "what", "changes"),
    [
        _case("first evaluation", 1, STEP.format(0), TP2, THOROUGH),
        _case("generated", 2, MID_STEP.format(1), {**TP2, "use_distributed_optimizer": True}),
        _case("scored", 3, MID_STEP.format(1), TP2, THOROUGH),
        _case("step, async save", 4, STEP.format(1), {**TP2, "async_save": True}),
        _case("evaluated", 5, STEP.format(1), TP2, THOROUGH),
        _case("lag, scored", 7, MID_STEP.format(2), {"rollout_lag": 1}),
        _case("lag, step", 8, STEP.format(2), {"rollout_lag": 1, "pipeline_model_parallel_size": 2}, THOROUGH),
        _case("supervised", 2, STEP.format(1), SFT),
        _case("last step", 12, STEP.format(3), TP2, THOROUGH),
        _case("last evaluation", 14, "all steps are saved", TP2),
    ],
)
@pytest.mark.fault(number=4)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(ranks, world, unbroken, tmp_path, number, what, changes):
    (_, weights), curve = unbroken(**changes)
    argv = _argv(world, tmp_path / "run", **changes)
    texts = {text for text, _ in ranks(2).run(_launch, argv, number)}
    assert len(texts) == 1, "every rank stops alike"
    (text,) = texts
    assert text.startswith(f"Stopped by SIGTERM: {what} in {tmp_path / 'run' / 'checkpoints'}."), text
    text, resumed = ranks(2).run(_launch, argv)[0]
    assert text == "" and resumed == weights
    assert _curve(tmp_path / "run") == curve, "also the evaluation that was left out"


def test_intervals_durations_and_a_file(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", exit_interval=2)
    for step in (2, 4):
        text = ranks(2).run(_launch, argv)[0][0]
        assert text.startswith(f"Stopped by --exit-interval 2: the state after step {step} is saved") == (step < 4)
    assert [step for step, *_ in _curve(tmp_path / "run")[0]] == [1, 2, 3, 4], "the last step is the end of the run"
    argv = flags(world, tmp_path / "other")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / STOP_FILE).touch()  # of an earlier launch
    assert ranks(2).run(_launch, argv)[0][0] == "" and not (tmp_path / "other" / STOP_FILE).exists()


def test_what_cannot_be_deleted_or_looked_at_ends_no_rank(tmp_path):
    config = TrainConfig(logging=LoggingConfig(run_dir=str(tmp_path)))
    stopping = Stopping(config, StopRequest(), 0.0)
    (tmp_path / STOP_FILE).mkdir()
    stopping.begin()
    assert stopping.why() == f"the file {tmp_path / STOP_FILE}"
    stopping.obeyed("SIGTERM")
    assert stopped_file(config).read_text() == "SIGTERM\n"
    (tmp_path / STOP_FILE).rmdir()
    stopping.begin()
    assert stopping.why() is None and not stopped_file(config).exists()


def _ranks_of(job):
    return sorted(psutil.Process(job.pid).children(), key=lambda process: process.pid)


def _by_file(job, run_dir):
    (run_dir / STOP_FILE).touch()


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (lambda job, _: job.terminate(), "SIGTERM"),
        pytest.param(lambda job, _: _ranks_of(job)[1].send_signal(signal.SIGUSR1), "SIGUSR1", marks=THOROUGH),
        (_by_file, "the file"),
    ],
    ids=["torchrun", "one rank", "file"],
)
@pytest.mark.fault(number=4)
def test_a_job_saves_and_says_how_to_go_on(world, tmp_path, act, why):
    run_dir = tmp_path / "run"
    argv = flags(world, run_dir, train_iters=10000, tensor_model_parallel_size=2)
    with start(argv, tmp_path) as job:
        done = wait_for_steps(run_dir / "metrics.jsonl", 2, job, timeout=400)
        act(job, run_dir)
        assert job.wait(timeout=300) == 1, "torchrun's own"
    assert job.output.count(f"Stopped by {why}") == 1 and job.output.count("it goes on from there") == 1, job.output
    assert not (run_dir / STOP_FILE).exists()
    saved = int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text())
    steps = [step for step, *_ in _curve(run_dir)[0]]
    assert saved == steps[-1] >= done and steps == list(range(1, saved + 1)), "no step is lost"
    assert why == "SIGTERM" or "exitcode  : 75" in job.output, job.output


@pytest.mark.parametrize(
    "act", [pytest.param(lambda job, _: job.terminate(), marks=THOROUGH), _by_file], ids=["SIGTERM", "file"]
)
def test_what_a_dedicated_teachers_ranks_do(world, tmp_path, act):
    """They go on until the trainer has saved, and end as it does."""
    run_dir = tmp_path / "run"
    argv = flags(world, run_dir, train_iters=10000, teacher_placement="dedicated", teacher_world_size=1)
    with start(argv, tmp_path) as job:
        wait_for_steps(run_dir / "metrics.jsonl", 1, job, timeout=400)
        act(job, run_dir)
        assert job.wait(timeout=300) == 1
    assert job.output.count("Stopped by ") == 1 and "Terminated" not in job.output, job.output
    assert "exitcode  : 1 " not in job.output, "the teacher's rank has the code of the others"
    assert (run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def _trainer_or_teacher(argv):
    """On the first rank of a job: the text with which the run stopped; on the other one, which scores: why it did."""
    from megatron_tropd.cli import parse
    from megatron_tropd.parallel.roles import TRAINER, job_of_environment
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.setup.teacher_world import make_worker

    spec = make_run_spec(parse(argv), int(os.environ["WORLD_SIZE"]))
    job = job_of_environment(spec.roles)
    return _launch(argv)[0] if job.role.name == TRAINER else make_worker(spec, job).serve()


def test_a_dedicated_teacher_is_told_why_the_run_ended(world, tmp_path):
    """Not by a file: none can be written here, and one may be seen late on another machine."""
    argv = flags(world, tmp_path, teacher_placement="dedicated", teacher_world_size=1, exit_interval=2)
    stopped_file(TrainConfig(logging=LoggingConfig(run_dir=str(tmp_path)))).mkdir()
    with closing(RankPool(2, serve=partial(serve, teacher_ranks=1))) as pool:
        text, why = pool.run(_trainer_or_teacher, argv)
        assert text.startswith("Stopped by --exit-interval 2") and why == "--exit-interval 2"
        pool.run(_new_names, 1)
        assert pool.run(_trainer_or_teacher, argv) == ["", ""], "this launch makes the last step"


def _new_names(number):
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # names of the store are new, as after torchrun's restart
