"""The parts of the quickstart: which commands it runs for each placement of the teacher, and how it judges the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tropd.cli import parse
from tools.quickstart import RANKS, accuracies, arguments, judge, parts

ROOT = Path(__file__).resolve().parent.parent


def _commands(directory, *words):
    """(title, module or script, its flags) of every part."""
    args = arguments(["--directory", str(directory), *words])
    found = []
    for part in parts(args, directory / "world", directory / "job"):
        line = [str(word) for word in part.words]
        at = line.index("-m", line.index("--nproc-per-node")) + 1 if "--nproc-per-node" in line else 1
        found.append((part.title, line[at], line[at + 1 :]))
    return found


@pytest.mark.parametrize("teacher", RANKS)
def test_the_flags_of_every_placement_are_flags_of_the_training_command(tmp_path, monkeypatch, teacher):
    monkeypatch.chdir(ROOT)  # where the quickstart runs its parts
    *_, (_, module, argv) = _commands(tmp_path, "--teacher", teacher, "--", "--train-iters", "7")
    config = parse(argv)
    assert module == "megatron_tropd.train"
    assert config.teacher.teacher_placement == teacher and config.training.train_iters == 7
    assert config.objective.objective == ("kd" if teacher == "file" else "tropd")


def test_stored_scores_are_made_from_what_the_run_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = _commands(tmp_path, "--teacher", "file", "--", "--top-k", "5")
    assert [module for _, module, _ in commands[-2:]] == ["megatron_tropd.score_responses", "megatron_tropd.train"]
    scored, trained = (parse(argv) for _, _, argv in commands[-2:])
    assert scored.teacher.teacher_scores == trained.teacher.teacher_scores == str(tmp_path / "job/teacher_scores")
    assert scored.data == trained.data and scored.objective == trained.objective
    assert scored.teacher.teacher_load == trained.teacher.teacher_load
    assert "TrOPD" not in commands[-1][0], "kd on stored scores is another method"


@pytest.mark.parametrize(("after", "good"), [(0.6, True), (0.3, False)])
def test_the_verdict_is_of_greedy_and_top_p(tmp_path, capsys, after, good):
    lines = [
        {"kind": "eval", "step": step, "decoding": decoding, "accuracy": accuracy}
        for decoding in ("greedy", "top_p_0.7", "temperature_1")
        for step, accuracy in ((0, 0.25), (20, after if decoding != "temperature_1" else 0.1))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert accuracies(lines, "greedy") == {0: 0.25, 20: after}
    assert judge(tmp_path, min_points=15.0) is good
    printed = capsys.readouterr().out
    assert f"rise by at least 15 points: {'yes' if good else 'NO'}" in printed and "-15.0   (not judged)" in printed
