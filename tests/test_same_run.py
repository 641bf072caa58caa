"""A resume that would be another experiment is refused; what else changed is shown."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_tropd.checkpoints.metadata import METADATA_JSON, parse_metadata
from tests.damage import edit_json, flip_hf
from tests.tiny_run import flags, make_world, outcome_here

STOP = 1


def _train(argv, stop_after=None):
    """(error or None, what the launch printed, first step trained)."""
    error, printed, steps = outcome_here(argv, stop_after)
    return error, printed, steps[0] if steps else None


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(ranks, world, tmp_path_factory):
    """A run of which one step is saved."""
    run = tmp_path_factory.mktemp("trained") / "run"
    ((error, *_),) = ranks(1).run(_train, flags(world, run, save_interval=1), STOP)
    assert error is None
    return run


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _resume(ranks, world, run, size=1, **changes):
    answers = ranks(size).run(_train, flags(world, run, **{"save_interval": 1, **changes}), STOP + 1)
    assert len({error for error, _, _ in answers}) == 1, "every rank has the same error"
    return answers[0]


def test_another_experiment_is_refused_on_every_rank_and_changes_no_file(ranks, world, run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    error, _, _ = _resume(ranks, world, run, size=2, objective="opd", lr=5e-3, seed=8, top_k=6)
    assert error.startswith("ConfigError: 1 configuration error:")
    for line in ("--objective: tropd -> opd", "--seed: 7 -> 8", "--top-k: 5 -> 6"):
        assert error.count(line) == 1
    assert "--allow-changed-run" in error and "--lr" not in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changes",
    [{"guidance": "none"}, {"max_response_length": 11}, {"answer_key": "prompt"}, {"guidance_beta": 0.4}],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting_of_the_experiment_counts(ranks, world, run, changes):
    error, _, _ = _resume(ranks, world, run, **changes)
    assert f"--{next(iter(changes)).replace('_', '-')}: " in error and "--allow-changed-run" in error


def test_what_is_allowed_is_shown_once(ranks, world, run):
    error, printed, step = _resume(
        ranks, world, run, size=2, lr=5e-3, tensor_model_parallel_size=2, train_iters=9, weight_decay=0.2
    )
    assert error is None and step == STOP + 1
    for line in ("--lr: 0.001 -> 0.005", "--weight-decay: 0.1 -> 0.2", "--train-iters: 4 -> 9",
                 "--tensor-model-parallel-size: 1 -> 2"):  # fmt: skip
        assert printed.count(line) == 1
    error, printed, _ = ranks(1).run(_train, flags(world, run, save_interval=1, lr=5e-3, train_iters=9,
                                                   tensor_model_parallel_size=1, weight_decay=0.2), STOP + 2)[0]  # fmt: skip
    assert error is None
    assert "--lr" not in printed and "--tensor-model-parallel-size: 2 -> 1" in printed


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"use_distributed_optimizer": True, "allow_changed_run": True}, "--use-distributed-optimizer"),
        ({"bf16": True}, "--no-use-distributed-optimizer --bf16"),
    ],
)
def test_optimizer_state_of_another_form_is_refused(ranks, world, run, changes, new):
    """Megatron's own errors for it are a KeyError or hundreds of unexpected keys."""
    error, _, _ = _resume(ranks, world, run, **changes)
    assert f"is that of --no-use-distributed-optimizer --no-bf16, and {new} cannot read it: give the former" in error


def test_the_distributed_optimizers_state_serves_both_precisions(ranks, world, tmp_path):
    argv = {"use_distributed_optimizer": True, "save_interval": 1}
    ((error, *_),) = ranks(1).run(_train, flags(world, tmp_path / "run", **argv), STOP)
    assert error is None
    error, printed, step = _resume(ranks, world, tmp_path / "run", bf16=True, **argv)
    assert error is None and step == STOP + 1 and "--bf16: False -> True" in printed
    error, _, _ = _resume(ranks, world, tmp_path / "run", bf16=True)
    assert "is that of --use-distributed-optimizer, and --no-use-distributed-optimizer --bf16 cannot read it" in error


def test_an_allowed_change_goes_on_and_is_what_the_next_resume_compares_with(ranks, world, run):
    changes = {"objective": "opd", "seed": 8}
    error, printed, step = _resume(ranks, world, run, **changes, allow_changed_run=True)
    assert error is None and step == STOP + 1
    assert "--objective: tropd -> opd" in printed
    argv = flags(world, run, save_interval=1, **changes)
    error, printed, step = ranks(1).run(_train, argv, STOP + 2)[0]
    assert error is None and step == STOP + 2 and "changed since" not in printed


def test_the_same_content_elsewhere_is_the_same_run(ranks, world, run, tmp_path):
    moved = Path(shutil.copytree(world, tmp_path / "moved"))
    error, printed, step = _resume(ranks, moved, run)
    assert error is None and step == STOP + 1
    assert "--teacher-hf-checkpoint: " in printed and "(the same weights)" in printed
    assert "--prompt-data: " in printed and "(the same prompts)" in printed
    (tmp_path / "link").symlink_to(moved)
    error, printed, _ = ranks(1).run(_train, flags(tmp_path / "link", run, save_interval=1), STOP + 2)[0]
    assert error is None and "changed since" not in printed


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_weights_that_changed_in_place_are_refused(ranks, world, run, tmp_path, model):
    """A flip of the lowest bit: no number that the model gives shows it."""
    damaged = Path(shutil.copytree(world, tmp_path / "damaged"))
    flip_hf(damaged / model, "model.norm.weight", 0, bit=0)
    error, _, _ = _resume(ranks, damaged, run)
    assert {"teacher": "--teacher-hf-checkpoint: ", "student": "--hf-checkpoint: "}[model] in error
    error, _, step = _resume(ranks, damaged, run, allow_changed_run=True)
    assert error is None and step == STOP + 1
    flip_hf(damaged / model, "model.norm.weight", 1, bit=0)
    error, _, _ = ranks(1).run(_train, flags(damaged, run, save_interval=1), STOP + 2)[0]
    assert f"weights of the {model} (--" in error and "sha256" in error


def test_other_prompts_are_refused_and_start_at_their_beginning_if_allowed(ranks, world, run, tmp_path):
    rows = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    error, _, _ = _resume(ranks, world, run, prompt_data=other)
    assert "--prompt-data: " in error
    error, _, step = _resume(ranks, world, run, prompt_data=other, allow_changed_run=True)
    assert error is None and step == STOP + 1
    record = json.loads((run / f"checkpoints/iter_{STOP + 1:07d}/run.json").read_text())
    assert record["settings"]["prompt-data"] == [str(other)]


def test_answers_count_where_they_are_rewards(ranks, world, tmp_path):
    other = Path(shutil.copytree(world, tmp_path / "world"))
    common = {"objective": "grpo", "reward_function": "megatron_tropd.grading.rewards:exact_match", "save_interval": 1}
    argv = flags(other, tmp_path / "run", **common)
    assert ranks(1).run(_train, argv, STOP)[0][0] is None
    path = other / "train.jsonl"
    path.write_text(path.read_text().replace('"answer": "w3"', '"answer": "w4"'))
    assert "answers in the files of --prompt-data" in ranks(1).run(_train, argv, STOP + 1)[0][0]
    argv = flags(world, tmp_path / "run", **common, answer_pattern="(w4)")
    assert "--answer-pattern: (w3) -> (w4)" in ranks(1).run(_train, argv, STOP + 1)[0][0]


def test_a_checkpoint_of_an_older_version_resumes(ranks, world, run):
    folder = run / f"checkpoints/iter_{STOP:07d}"
    (folder / "run.json").unlink()
    metadata = parse_metadata(folder / METADATA_JSON)
    files = {name: record for name, record in metadata.files.items() if name != "run.json"}
    (folder / METADATA_JSON).write_text(replace(metadata, files=files).to_json())
    error, printed, step = _resume(ranks, world, run, lr=2e-3)
    assert error is None and step == STOP + 1
    assert "does not record its settings; whether they changed is not known" in printed
    assert (run / f"checkpoints/iter_{STOP + 1:07d}/run.json").is_file()


def test_a_checkpoint_of_another_run_is_compared_too(ranks, world, run, tmp_path):
    load = {"load": run / "checkpoints"}
    error, _, _ = _resume(ranks, world, tmp_path / "other", **load, objective="opd")
    assert "--objective: tropd -> opd" in error and "--pretrained-checkpoint" in error
    assert not (tmp_path / "other").exists()
    error, printed, step = _resume(ranks, world, tmp_path / "other", **load)
    assert error is None and step == STOP + 1 and "changed since" not in printed


def test_a_new_run_from_trained_weights_is_not_a_resume(ranks, world, run, tmp_path):
    changes = {"objective": "opd", "pretrained_checkpoint": run / "checkpoints"}
    error, printed, step = _resume(ranks, world, tmp_path / "other", **changes)
    assert error is None and step == 1 and "changed since" not in printed


def test_changed_code_is_shown(ranks, world, run):
    folder = run / f"checkpoints/iter_{STOP:07d}"
    edit_json(folder, "run.json", lambda value: value.update(code="0.2.0, commit 0123456789ab"))
    error, printed, _ = _resume(ranks, world, run)
    assert error is None and "code: 0.2.0, commit 0123456789ab -> " in printed


def test_a_damaged_record_is_one_message(ranks, world, run):
    (run / f"checkpoints/iter_{STOP:07d}/run.json").write_text("{")
    error, _, _ = _resume(ranks, world, run)
    assert error.startswith("ConfigError: ") and "run.json is damaged" in error
