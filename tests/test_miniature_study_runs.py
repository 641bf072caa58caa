"""The miniature study's processes: they fail and end alone, and one runs the training command for real."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_tropd.reporting.records import read_records
from tests.waiting import wait_for
from tools.small_world import build
from tools.study import driver, jobs, plan, results, worlds

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.slow


def test_jobs_end_with_a_driver_that_is_killed(tmp_path):
    program = (
        "import time; from pathlib import Path; from tools.study import jobs; jobs.PRELOADED = []; "
        f"job = jobs.Job(name='j', function=time.sleep, arguments=(900,), log=Path({str(tmp_path / 'log')!r})); "
        "jobs.run_jobs([job], 1, print)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as process:
        wait_for((tmp_path / "log").is_file)  # the job runs
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2  # the server and the job
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive


def test_a_job_that_dies_is_a_failure_and_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PRELOADED", ["tests.warm_imports"])
    made = [
        jobs.Job(name=name, function=function, arguments=arguments, log=tmp_path / name)
        for name, function, arguments in (
            ("dies", os._exit, (0,)), ("raises", math.sqrt, (-1.0,)), ("returns", math.sqrt, (4.0,))
        )
    ]  # fmt: skip
    outcomes = []
    jobs.run_jobs(made, 2, outcomes.append)
    ends = {outcome.job.name: (outcome.failed, outcome.value) for outcome in outcomes}
    assert ends == {"dies": (True, None), "raises": (True, None), "returns": (False, 2.0)}
    assert "ValueError: " in (tmp_path / "raises").read_text()


def tiny_networks(place, seeds):
    """Networks of few steps, where the driver looks for those of B4."""
    few = {"num_lessons": 64, "max_steps": 2, "stop_accuracy": math.inf}
    for network in itertools.chain(*(worlds.networks_of("B4", seed) for seed in seeds)):
        directory = place.networks / network.name
        spec = build.WorldSpec(save=directory, seed=network.seed, num_train_prompts=40, num_eval_prompts=4)
        directory.mkdir(parents=True)
        recipe = replace(network.recipe, **few)
        if recipe.name == "teacher":
            build.make_teacher_side(replace(spec, teacher=recipe))
        else:
            build.make_network(spec, recipe)
        (directory / worlds.FACTS).write_text("{}")


@pytest.mark.thorough
def test_driver_runs_the_training_command_and_goes_on_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "PRELOADED", ["tests.warm_imports"])  # the server of this test session may run already
    place, said = driver.Place(root=tmp_path), []
    good, bad = (plan.Cell(seed=seed, world="B4", steps=2, lr=1e-3, method="fkl_outlier") for seed in (0, 1))
    tiny_networks(place, (0, 1))
    train = worlds.files_of(bad, place.networks).train
    train.rename(train.with_suffix(".away"))
    with pytest.raises(driver.StudyError, match=r"1 of 2 runs failed: B4-fkl_outlier-lr0\.001-2steps-seed1"):
        driver.run_study([bad, good], place, 1, keep_runs=True, say=said.append)
    assert "train.jsonl" in (place.logs / f"{bad.name}.log").read_text()
    (done,) = results.read(place.results)
    assert done.cell == good and done.settings == worlds.settings_of(good)
    lines = read_records(place.run_dir(good) / "metrics.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    assert done.grad_norm == pytest.approx([np.mean([step["grad_norm"] for step in steps])], rel=1e-3)
    assert done.entropy == pytest.approx([np.mean([step["metrics"]["student/entropy"] for step in steps])], rel=1e-3)
    after = {line["decoding"]: line["accuracy"] for line in lines if line["kind"] == "eval" and line["step"] == 2}
    assert done.after == after and set(done.before) == set(after) == set(results.DECODINGS)
    assert {line["num_samples"] for line in lines if line["kind"] == "eval"} == {1, 2}

    train.with_suffix(".away").rename(train)
    before = place.results.read_bytes()
    place.results.write_bytes(before + before[:50])  # as a command that was killed while writing leaves it
    driver.run_study([bad, good], place, 1, say=said.append)
    assert place.results.read_bytes().startswith(before)
    assert [one.cell for one in results.read(place.results)] == [good, bad]
    assert not place.run_dir(bad).exists() and place.run_dir(good).is_dir()
    driver.run_study([bad, good], place, 1, say=said.append)
    assert said[-1].startswith("2 of 2 runs are in")
