"""--teacher-placement file: the run that a colocated teacher gives, from scores that were made once."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.teacher.stored.files import Manifest, ScoreFiles, key_of, shard_keys, shard_path, write_shard
from megatron_tropd.types import TeacherScores
from tests.hf_models import read_tensors, write_tensors
from tests.tiny_run import flags, make_world, reports_here
from tests.torchrun_jobs import output_of

TOLERANCE = 1e-6
MAKERS = {
    "one rank": (1, {}),
    "TP2": (2, {"teacher_tensor_model_parallel_size": 2}),
    "PP2": (2, {"teacher_pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
}
STUDENTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2, two updates": (2, {"num_minibatches": 2}),
}


def _spec(argv, size):
    """What the command of score_responses checks."""
    config = parse(argv)
    teacher = replace(config.teacher, teacher_placement="colocated", teacher_scores="")
    return make_run_spec(replace(config, teacher=teacher), size)


def _score(argv, directory):
    """Score on the ranks of a test pool; (done, skipped) after every shard."""
    import torch.distributed as dist

    from megatron_tropd.setup import response_scores

    told = []
    response_scores.score_responses(_spec(argv, dist.get_world_size()), Path(directory), told.append)
    return [(progress.done, progress.skipped) for progress in told]


def _score_in_small_shards(argv, directory):
    from megatron_tropd.setup import stored_scores

    before, stored_scores.SHARD_RESPONSES = stored_scores.SHARD_RESPONSES, 10
    try:
        return _score(argv, directory)
    finally:
        stored_scores.SHARD_RESPONSES = before


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), kv_heads=4)


@pytest.fixture(scope="module")
def stored(ranks, world, tmp_path_factory):
    """The scores of all 24 responses in three shards, by a teacher of TP 2."""
    directory = tmp_path_factory.mktemp("stored")
    argv = flags(world, directory / "run", objective="kd", **MAKERS["TP2"][1])
    assert ranks(2).run(_score_in_small_shards, argv, directory / "scores")[0] == [(10, 0), (20, 0), (24, 0)]
    return directory / "scores"


def _run(world, run, scores, **changes):
    chosen = {"teacher_placement": "file", "teacher_scores": scores, "objective": "kd", "train_iters": 3}
    return flags(world, run, **{**chosen, **changes})


@pytest.mark.parametrize("name", STUDENTS)
def test_losses_and_gradients_are_those_of_a_colocated_teacher(ranks, world, stored, tmp_path, name, measured):
    size, changes = STUDENTS[name]
    there = ranks(size).run(reports_here, _run(world, tmp_path / "there", stored, **changes))[0]
    argv = flags(world, tmp_path / "here", objective="kd", train_iters=3, **changes)
    here = ranks(size).run(reports_here, argv)[0]
    worst = max(
        abs(mine - theirs) / abs(theirs)
        for report, other in zip(there, here, strict=True)
        for mine, theirs in ((report.loss, other.loss), (report.grad_norm, other.grad_norm))
    )
    measured(f"kd from stored scores equals kd with a colocated teacher, {name} (relative)", worst, TOLERANCE)
    assert here[0].loss > 0.1 and here[0].loss != here[2].loss
    # A teacher with other scores is another run: the comparison can fail.
    for metric in ("teacher/logprob_mean", "teacher/entropy"):
        assert abs(there[0].metrics[metric] - here[0].metrics[metric]) < 1e-5


@pytest.mark.parametrize("name", MAKERS)
def test_every_layout_of_the_teacher_stores_the_same(ranks, world, stored, tmp_path, name):
    size, changes = MAKERS[name]
    argv = flags(world, tmp_path / "run", objective="kd", **changes)
    ranks(size).run(_score_in_small_shards, argv, tmp_path / "scores")
    mine, theirs = ScoreFiles(tmp_path / "scores"), ScoreFiles(stored)
    assert mine.manifest == theirs.manifest
    keys = [key for number in range(3) for key in shard_keys(shard_path(stored, number))]
    assert len(set(keys)) == 24 and not mine.missing(keys)
    for key in keys:
        a, b = (files.scores(key, top_k=5, entropy=False) for files in (mine, theirs))
        torch.testing.assert_close(a.logprob, b.logprob, rtol=0, atol=1e-5)
        torch.testing.assert_close(a.topk_logprobs, b.topk_logprobs, rtol=0, atol=1e-5)
        assert torch.equal(a.topk_ids, b.topk_ids)


def test_what_was_scored_is_kept_and_another_teacher_is_refused(ranks, world, stored, tmp_path):
    directory = tmp_path / "scores"
    shutil.copytree(stored, directory)
    shard_path(directory, 1).unlink()
    argv = flags(world, tmp_path / "run", objective="kd")
    assert ranks(1).run(_score_in_small_shards, argv, directory) == [[(10, 10), (20, 10), (24, 14)]]
    assert ScoreFiles(directory).manifest == ScoreFiles(stored).manifest
    assert not [path for path in directory.iterdir() if path.name.startswith(".")], "nothing half written is left"
    with pytest.raises(AssertionError, match=r"holds other scores \(top_k 5, not 3\): name another directory"):
        ranks(1).run(_score_in_small_shards, flags(world, tmp_path / "run", objective="kd", top_k=3), directory)


def test_scores_without_entropies_give_the_same_losses_and_no_entropy(ranks, world, stored, tmp_path):
    bare = tmp_path / "scores"
    shutil.copytree(stored, bare)
    replace(Manifest.read(bare), entropy=False).write(bare)
    runs = [_run(world, tmp_path / name, path, train_iters=1) for name, path in (("a", stored), ("b", bare))]
    (one,), (other,) = (ranks(1).run(reports_here, run)[0] for run in runs)
    assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    assert one.metrics.keys() - other.metrics.keys() == {"teacher/entropy"} and one.metrics["teacher/entropy"] > 0


def test_a_smaller_topk_is_the_first_of_the_stored(ranks, world, stored, tmp_path, measured):
    (there,) = ranks(1).run(reports_here, _run(world, tmp_path / "there", stored, top_k=3, train_iters=1))[0]
    (here,) = ranks(1).run(reports_here, flags(world, tmp_path / "here", objective="kd", top_k=3, train_iters=1))[0]
    measured("kd from the first 3 of a stored top-5 (relative)", abs(there.loss / here.loss - 1), TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher_scores": None}, "--teacher-placement file needs --teacher-scores DIR"),
        ({"teacher_scores": "/nowhere"}, "--teacher-scores /nowhere has no manifest.json: make it with"),
        ({"objective": "tropd"}, "--objective tropd cannot use --teacher-placement file: .* --objective kd only"),
        ({"objective": "sft"}, "--objective sft cannot use --teacher-placement file"),
        ({"top_k": 6}, r"holds a top-5, --top-k is 6: lower it, or score the responses again"),
        ({"gradient_diagnostics_interval": 1}, "--gradient-diagnostics-interval needs .* set it to 0"),
        ({"teacher_placement": "colocated"}, "--teacher-scores .* is for --teacher-placement file; it is colocated"),
        (
            {"max_response_length": 4},
            r"has no scores of \d+ of 24 responses of --prompt-data, the first that of prompt",
        ),
    ],
)
def test_mistakes_are_told_before_anything_starts(world, stored, tmp_path, changes, expected):
    with pytest.raises(ConfigError, match=expected):
        make_run_spec(parse(_run(world, tmp_path / "run", stored, **changes)), 1)


def test_the_scores_of_another_teacher_are_refused(ranks, world, stored, tmp_path):
    other = tmp_path / "teacher"
    shutil.copytree(world / "teacher", other)
    tensors = read_tensors(other)
    tensors["model.norm.weight"] *= 2
    write_tensors(other, tensors)
    argv = _run(world, tmp_path / "run", stored, teacher_hf_checkpoint=other)
    with pytest.raises(AssertionError, match=r"is of a teacher with the digest \w{12}; that of"):
        ranks(1).run(reports_here, argv)


def test_damaged_files_are_named(stored, tmp_path):
    directory = tmp_path / "scores"
    shutil.copytree(stored, directory)
    path = shard_path(directory, 2)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"scores-00002.safetensors is damaged"):
        ScoreFiles(directory)
    for text, expected in (('{"version": 9}', "version 9, expected 1"), ('{"version": 1}', "damaged")):
        (directory / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=expected):
            Manifest.read(directory)


def test_a_key_is_of_the_tokens_and_of_where_the_response_begins():
    assert key_of([1, 2, 3], 1) == key_of((1, 2, 3), 1)
    assert len({key_of([1, 2, 3], 1), key_of([1, 2, 3], 2), key_of([1, 2, 4], 1), key_of([1, 2], 1)}) == 4


def test_scores_come_back_bit_by_bit(tmp_path):
    def scores(length, seed):
        generator = torch.Generator().manual_seed(seed)
        return TeacherScores(
            logprob=-torch.rand(length, generator=generator),
            topk_ids=torch.randint(0, 9, (length, 4), generator=generator, dtype=torch.int32),
            topk_logprobs=-torch.rand(length, 4, generator=generator), entropy=torch.rand(length, generator=generator),
        )  # fmt: skip

    Manifest(teacher="t", top_k=4, vocab_size=9, entropy=True).write(tmp_path)
    written = {bytes([n] * 16): scores(n + 1, n) for n in range(5)}
    write_shard(shard_path(tmp_path, 0), list(written.items())[:2])
    write_shard(shard_path(tmp_path, 1), list(written.items())[2:])
    files = ScoreFiles(tmp_path)
    for key, expected in written.items():
        found = files.scores(key, top_k=3, entropy=True)
        assert torch.equal(found.logprob, expected.logprob) and torch.equal(found.entropy, expected.entropy)
        assert torch.equal(found.topk_ids, expected.topk_ids[:, :3])
        assert torch.equal(found.topk_logprobs, expected.topk_logprobs[:, :3])
    assert files.scores(b"?" * 16, top_k=3, entropy=True) is None and files.missing([b"?" * 16]) == [0]


@pytest.mark.slow
def test_the_command_under_torchrun(world, tmp_path):
    scores = tmp_path / "scores"
    argv = flags(world, tmp_path / "run", objective="kd", teacher_scores=scores, teacher_tensor_model_parallel_size=2)
    output = output_of(argv, tmp_path, ranks=2, module="megatron_tropd.score_responses")
    assert "scored 24 of 24 responses" in output and "torchrun exited with 0" in output, output
    assert ScoreFiles(scores).manifest.top_k == 5
    wrong = flags(world, tmp_path / "run", objective="tropd", teacher_scores=scores)
    output = output_of(wrong, tmp_path, ranks=1, module="megatron_tropd.score_responses")
    assert "--objective tropd does not learn from a teacher on the responses of the data" in output, output
