"""Every command that takes a model takes its name on the Hugging Face Hub, and records the commit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.parallel.roles import Job, split
from megatron_tropd.setup.same_configuration import check_same_configuration
from tests.hub_helpers import COMMIT, OTHER_COMMIT, fill_cache, hub_environment, serving
from tests.test_hub import ROOT
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import command

pytestmark = pytest.mark.slow
STUDENT, TEACHER = "some-team/student", "some-team/teacher"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def cache(world, tmp_path_factory):
    """HF_HOME of a machine that has both models."""
    home = tmp_path_factory.mktemp("home")
    fill_cache(home, STUDENT, world / "student")
    fill_cache(home, TEACHER, world / "teacher", commit=OTHER_COMMIT)
    return home


def _run(words, environment, cwd, status=0):
    environment = {**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode != 0) == (status != 0), done.stderr[-3000:]
    return done


def _module(name, *arguments):
    return [sys.executable, "-W", "ignore", "-m", name, *map(str, arguments)]


def test_a_job_downloads_its_models_once_and_records_their_commits(world, tmp_path):
    argv = flags(
        world, tmp_path / "run", hf_checkpoint=STUDENT, teacher_hf_checkpoint=f"{TEACHER}@v1", objective="gopd",
        reference_hf_checkpoint=STUDENT, train_iters=1, tensor_model_parallel_size=2,
    )  # fmt: skip
    with serving() as hub:
        hub.add(STUDENT, world / "student")
        hub.add(TEACHER, world / "teacher", commits={"v1": OTHER_COMMIT})
        _run(command(argv), hub_environment(tmp_path / "home", endpoint=hub.endpoint), tmp_path)
    assert hub.downloads["model.safetensors"] == 2, "one each of student and teacher"
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert recorded["hf-checkpoint"] == recorded["reference-hf-checkpoint"] == f"{STUDENT}@{COMMIT}"
    assert recorded["teacher-hf-checkpoint"] == f"{TEACHER}@{OTHER_COMMIT}"
    saved = json.loads((tmp_path / "run/checkpoints/iter_0000001/checkpoint.json").read_text())
    assert saved["source"] == f"{STUDENT}@{COMMIT}"
    exported = {path.name for path in (tmp_path / "run/hf_export").iterdir()}
    assert {"config.json", "tokenizer.json", "generation_config.json", "model.safetensors"} <= exported


@pytest.mark.thorough
def test_conversion_keeps_the_source_all_the_way(cache, tmp_path):
    environment = hub_environment(cache, offline=True)
    megatron, again, trained = tmp_path / "megatron", tmp_path / "again", "checkpoint_convert"
    to_megatron = _module(f"{trained}.hf_to_megatron", "--hf-checkpoint", STUDENT, "--save", megatron)
    assert f"from {STUDENT}@{COMMIT}" in _run(to_megatron, environment, tmp_path).stdout
    _run(_module(f"{trained}.megatron_to_megatron", "--load", megatron, "--save", again), environment, tmp_path)
    for directory in (megatron, again):
        assert json.loads((directory / "release/checkpoint.json").read_text())["source"] == f"{STUDENT}@{COMMIT}"
    assert (
        f"source         {STUDENT}@{COMMIT}" in _run(_module(f"{trained}.inspect", again), environment, tmp_path).stdout
    )


def test_conversion_of_a_name_that_is_not_there(tmp_path):
    words = _module("checkpoint_convert.hf_to_megatron", "--hf-checkpoint", STUDENT, "--save", tmp_path / "m")
    done = _run(words, hub_environment(tmp_path / "home", offline=True), tmp_path, status=2)
    assert done.stderr.startswith(f"error: --hf-checkpoint {STUDENT}: there is no such local path")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "m").exists()


@pytest.mark.thorough
def test_evaluation_by_name(world, cache, tmp_path):
    def words(student):
        return _module(
            "megatron_tropd.evaluate", "--hf-checkpoint", student, "--teacher-hf-checkpoint", TEACHER, "--eval-data",
            world / "eval.jsonl", "--decodings", "greedy", "--max-response-length", 4, "--answer-pattern", "(w3)",
        )  # fmt: skip

    environment = hub_environment(cache, offline=True)
    named, local = (_run(words(name), environment, tmp_path) for name in (STUDENT, world / "student"))
    assert named.stdout == local.stdout
    assert f"--hf-checkpoint {STUDENT}@{COMMIT}\n--teacher-hf-checkpoint {TEACHER}@{OTHER_COMMIT}\n" in named.stderr
    done = _run(words("some-team/gone"), environment, tmp_path, status=2)
    assert done.stderr.startswith("error: --hf-checkpoint some-team/gone: there is no such local path")


def test_names_that_are_not_there_are_in_the_one_message(world, cache, tmp_path):
    argv = flags(world, tmp_path / "run", hf_checkpoint="a/gone", teacher_hf_checkpoint="b/gone@v1")
    done = _run(_module("megatron_tropd.train", *argv), hub_environment(cache, offline=True), tmp_path, status=2)
    assert done.stderr.startswith("2 configuration errors:\n  - --hf-checkpoint a/gone: there is no such")
    assert "\n  - --teacher-hf-checkpoint b/gone@v1: there is no such local path" in done.stderr


def test_nothing_is_downloaded_for_a_configuration_that_cannot_be_used(world, tmp_path):
    argv = flags(world, tmp_path / "run", hf_checkpoint=STUDENT, log_interval=0)
    with serving() as hub:
        hub.add(STUDENT, world / "student")
        environment = hub_environment(tmp_path / "home", endpoint=hub.endpoint)
        done = _run(_module("megatron_tropd.train", *argv), environment, tmp_path, status=2)
    assert (
        done.stderr.startswith("1 configuration error:\n  - --log-interval 0 must be at least 1") and not hub.downloads
    )


def test_an_incomplete_cache_names_what_is_missing(world, cache, tmp_path):
    snapshot = fill_cache(tmp_path / "home", STUDENT, world / "student")
    (snapshot / "model.safetensors").unlink()
    argv = flags(world, tmp_path / "run", hf_checkpoint=STUDENT)
    done = _run(
        _module("megatron_tropd.train", *argv), hub_environment(tmp_path / "home", offline=True), tmp_path, status=2
    )
    assert f"student (--hf-checkpoint): {snapshot} has neither model.safetensors nor" in done.stderr


def _compare(argvs):
    import torch.distributed as dist

    with pytest.raises(ConfigError) as caught:
        check_same_configuration(parse(argvs[dist.get_rank()]), Job(roles=split(2, ()), rank=dist.get_rank()))
    return str(caught.value)


def test_ranks_with_different_configurations_are_refused_on_every_rank(ranks):
    """Two nodes may look a branch up at different times, or read different files."""
    argvs = [
        ["--hf-checkpoint", f"{STUDENT}@{commit}", "--lr", lr] for commit, lr in ((COMMIT, "1"), (OTHER_COMMIT, "2"))
    ]
    first, second = ranks(2).run(_compare, argvs)
    assert first == second and first.startswith("2 configuration errors:")
    assert f"--hf-checkpoint is '{STUDENT}@{COMMIT}' on rank 0 and '{STUDENT}@{OTHER_COMMIT}' on rank 1" in first
    assert "--lr is 1.0 on rank 0 and 2.0 on rank 1" in first


def test_the_metadata_of_older_checkpoints_has_no_source(tmp_path, cache):
    from megatron_tropd.checkpoints.metadata import CheckpointMetadata, parse_metadata
    from megatron_tropd.models.hf_config import architecture_from_hf_config, load_hf_config

    config = next(Path(cache).glob("hub/*student/snapshots/*/config.json")).parent
    metadata = CheckpointMetadata(
        iteration=1, architecture=architecture_from_hf_config(load_hf_config(config)), make_vocab_size_divisible_by=1,
        files={}, source="x",
    )  # fmt: skip
    written = json.loads(metadata.to_json())
    assert written.pop("source") == "x"
    (tmp_path / "checkpoint.json").write_text(json.dumps(written))
    assert parse_metadata(tmp_path / "checkpoint.json").source == ""
