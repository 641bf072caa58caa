"""How a job of the training command ends: one message on the node, whichever rank has the end first.

In each job one rank is delayed until the other has ended, so that the other alone can print.
"""

from __future__ import annotations

import signal

import psutil
import pytest

from megatron_tropd.cli import parse
from megatron_tropd.parallel.job_end import Terminated
from megatron_tropd.train import Launch
from megatron_tropd.training.guard import NonFiniteStep
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import (
    environment,
    output_from_imports_on,
    output_of,
    output_with_delay,
    own_tracebacks,
    start,
    wait_for_steps,
)

pytestmark = pytest.mark.slow

MODULE = "tests.ending_command"
CONTINUE = "Run the same command again"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _exit_codes(text):
    """The codes of torchrun's summary."""
    return [int(line.split(":")[1].split()[0]) for line in text.splitlines() if line.startswith("  exitcode  :")]


@pytest.mark.parametrize("delayed", [None, 0, 1])
def test_a_configuration_error(world, tmp_path, delayed):
    argv = flags(world, tmp_path / "run", tensor_model_parallel_size=2, top_k=0, lr=-1)
    text = output_with_delay(delayed, argv, tmp_path)
    assert text.count("configuration errors:") == 1 and text.count("--top-k 0 must be at least 1") == 1, text
    assert "--lr -1.0 must be positive" in text
    assert own_tracebacks(text) == 0 and 2 in _exit_codes(text) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("delayed", "spoiled", "code", "message"),
    [
        (0, {"NAN_LOSS": "1"}, 17, "loss is nan"),
        (1, {"NAN_LOSS": "1"}, 17, "loss is nan"),
        (0, {}, 18, "gradient norm is"),
    ],
)
def test_a_number_that_is_not_finite_or_absurd(world, tmp_path, delayed, spoiled, code, message):
    argv = flags(world, tmp_path / "run", tensor_model_parallel_size=2, spike_grad_norm=1e-6)
    env = environment(AT="megatron_tropd.training.guard:Guard.judge", DELAYED_RANK=str(delayed), **spoiled)
    text = output_of(argv, tmp_path, env, MODULE)
    assert text.count("step 1: ") == 1 and text.count(message) == 1 and text.count("no weight was changed") == 1, text
    assert own_tracebacks(text) == 0 and code in _exit_codes(text) and CONTINUE not in text


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run with a checkpoint, and its flags but for other prompts."""
    directory = tmp_path_factory.mktemp("stopped")
    changes = {"tensor_model_parallel_size": 2, "train_iters": 1}
    text = output_of(flags(world, directory / "run", **changes), directory)
    assert text.endswith("exited with 0"), text
    other = directory / "other.jsonl"
    other.write_text((world / "train.jsonl").read_text().replace("w10", "w11"))
    return flags(world, directory / "run", **{**changes, "train_iters": 2, "prompt_data": other})


@pytest.mark.parametrize("delayed", [0, 1])
def test_a_refused_resume(stopped, tmp_path, delayed):
    env = environment(AT="megatron_tropd.setup.assemble:find_origin", DELAYED_RANK=str(delayed))
    text = output_of(stopped, tmp_path, env, MODULE)
    assert text.count("belongs to another experiment") == 1 and text.count("--prompt-data: ") == 1, text
    assert own_tracebacks(text) == 0 and 2 in _exit_codes(text)
    assert CONTINUE not in text, "the same command would be refused again"


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank(world, tmp_path, rank):
    argv = flags(world, tmp_path / "run", tensor_model_parallel_size=2)
    env = environment(AT="megatron_tropd.training.guard:Guard.judge", FAULT_RANK=str(rank))
    text = output_of(argv, tmp_path, env, MODULE)
    assert text.count(f"rank {rank} failed:") == 1 and text.count("KeyError: 'the cause'") == 1, text
    assert (
        text.count("The job ends") == 1
        and "communication with the other ranks failed" not in text
        and "ended by" not in text
    )
    assert own_tracebacks(text) == 1 and "there is no checkpoint to go on from" in text, text


def test_an_error_that_every_rank_has(world, tmp_path):
    argv = flags(world, tmp_path / "run", teacher_hf_checkpoint=None, objective="grpo",
                 reward_function="tests.reward_functions:not_a_number")  # fmt: skip
    text = output_of(argv, tmp_path)
    assert text.count("The job ends") == 1 and text.count("RewardError: rank 0: ") == 1, text
    assert own_tracebacks(text) == 0, text


def _ranks(job):
    """The processes of the ranks, in their order."""
    return sorted(psutil.Process(job.pid).children(), key=lambda process: process.pid)


def _until(world, tmp_path, act):
    """The output of a job on which ``act`` is called after some steps."""
    argv = flags(world, tmp_path / "run", train_iters=10000, tensor_model_parallel_size=2, save_interval=2)
    with start(argv, tmp_path) as job:
        wait_for_steps(tmp_path / "run" / "metrics.jsonl", 3, job, timeout=400)
        act(job)
        assert job.wait(timeout=300) != 0
    return job.output


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.fault(number=1)
def test_a_killed_rank(world, tmp_path, victim):
    text = _until(world, tmp_path, lambda job: _ranks(job)[victim].kill())
    assert text.count("The job ends") == 1 and text.count(f"{CONTINUE}: it resumes from the last checkpoint") == 1, text
    assert own_tracebacks(text) == 0, text


def test_a_signal_that_does_not_wait_for_a_save(world, tmp_path):
    """tests/test_training_stops.py has those that do."""
    text = _until(world, tmp_path, lambda job: job.send_signal(signal.SIGQUIT))
    assert text.count("The job ends") == 1 and text.count("ended by SIGQUIT") == 1, text
    assert f"{CONTINUE}: it resumes from the last checkpoint" in text and own_tracebacks(text) == 0, text


def test_help_is_printed_once_and_first(tmp_path):
    text = output_from_imports_on(["--help"], tmp_path)
    assert text.count("usage: ") == 1 and text.startswith("usage: ") and text.endswith("exited with 0"), text


def test_the_message_says_whether_the_run_can_be_gone_on_with(world, tmp_path):
    launch, config = Launch(), parse(flags(world, tmp_path / "run", save_interval=5))
    assert "before its first step.  Run the same command again when the" in launch.end_of(RuntimeError("x")).text
    assert "before its first step.  Run the same command again." in launch.end_of(Terminated(signal.SIGTERM)).text
    launch.trains = config
    assert "no checkpoint to go on from (--save-interval 5)" in launch.end_of(RuntimeError("x")).text
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").write_text("5\n")
    end = launch.end_of(RuntimeError("x"))
    assert "RuntimeError: x" in end.text and f"{CONTINUE}: it resumes" in end.text and end.exit_code == 1
    assert launch.end_of(NonFiniteStep("nan")).exit_code == 17
