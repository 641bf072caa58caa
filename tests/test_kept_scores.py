"""Scores of an unfinished batch: on disk, and used again only for the same rollout, request and model."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack

import pytest
import torch

from megatron_tropd.record_files import read_records
from megatron_tropd.teacher.kept_scores import KeptScores, ScoreStore, _decode, _encode
from megatron_tropd.types import Rollout, ScoreRequest, TeacherScores, TopkUse
from tests.tiny_run import flags, make_world

WANT = ScoreRequest(top_k=3, entropy=True)
ROLLOUT = Rollout(
    prompt_uid=4, sample_index=1, token_ids=(5, 6, 7, 8, 9), prompt_len=2, guidance_len=1, logprobs=(-0.1, -0.25),
    weight_version=(3, 3), finish="stop",
)  # fmt: skip
SCORES = TeacherScores(
    logprob=torch.tensor([-1.5, -float("inf"), -0.3]), topk_rows=torch.tensor([1], dtype=torch.int32),
    topk_ids=torch.tensor([[4, 2, 9]], dtype=torch.int32), topk_logprobs=torch.tensor([[-0.1, -2.0, -3.0]]),
    entropy=torch.tensor([0.5, 0.25]),
)  # fmt: skip


def _keys(folder, said=None):
    """What a launch finds in the folder."""
    store = ScoreStore(folder, (said if said is not None else []).append)
    assert store.empty() == (not store._places)
    return {key: store.find(key) for key in store._places}


def _key(number):
    return bytes([number]) * 32


@pytest.fixture
def killed(tmp_path):
    """A folder in which a launch left the scores of two rollouts."""
    store = ScoreStore(tmp_path, print)
    assert store.empty() and store.find(_key(1)) is None
    store.add(7, {2: (_key(1), b"one")})
    store.add(7, {0: (_key(2), b"two")})
    return tmp_path


def test_the_next_launch_finds_what_was_kept(killed):
    assert _keys(killed) == {_key(1): b"one", _key(2): b"two"}
    ScoreStore(killed, print).add(7, {1: (_key(3), b"three")})
    assert sorted(_keys(killed)) == [_key(1), _key(2), _key(3)], "a second kill loses nothing either"


def test_what_is_cut_or_damaged_is_not_used(killed):
    (path,) = killed.iterdir()
    whole = path.read_bytes()
    for length in range(0, len(whole), 3):
        path.write_bytes(whole[:length])
        assert _keys(killed).items() <= {_key(1): b"one"}.items()
    good = {_key(1): b"one", _key(2): b"two"}
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert _keys(killed).items() <= good.items(), at
    path.write_bytes(whole)
    store = ScoreStore(killed, print)
    assert not store.empty()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # after it was looked at
    assert store.find(_key(1)) == b"one" and store.find(_key(2)) is None
    path.unlink()
    assert store.find(_key(1)) is None


def test_a_trained_batch_leaves_nothing_but_the_next_ones(killed):
    store = ScoreStore(killed, print)
    store.empty()
    for step in (7, 8, 9):
        store.add(step, {0: (_key(step), b"x")})
    store.clear(7)
    assert [path.name.split(".")[0] for path in killed.iterdir()] == ["8"] and store.empty()
    store.add(7, {0: (_key(5), b"too late")})
    store.add(8, {1: (_key(6), b"y")})
    assert sorted(_keys(killed)) == [_key(6), _key(8)]
    store.clear()
    assert not list(killed.iterdir())


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    said = []
    store = ScoreStore(tmp_path, said.append)
    for step in (3, 4):
        store.add(step, {})  # opens the file
        file = store._files[step]
        file._file.close()
        file.path.unlink()
        file.path.symlink_to("/dev/full")
        file._file = file.path.open("ab")
        store.add(step, {0: (_key(1), b"one")})
        store.add(step, {1: (_key(2), b"two")})
        assert not list(tmp_path.iterdir())
        store.clear(step)
    assert len(said) == 1 and "scores of unfinished batches are not kept" in said[0]
    store.show_failures()
    assert len(said) == 1, "the first rank's own"


def _batches_on_rank(folders):
    """Three batches on this rank: what it says."""
    import torch.distributed as dist

    said = []
    store = ScoreStore(folders[dist.get_rank()], said.append)
    for step in range(3):
        store.add(step, {0: (_key(step), b"scores")})
        store.show_failures()
        store.clear(step)
    return said


def test_the_first_rank_says_once_what_others_cannot_keep(ranks, tmp_path):
    (tmp_path / "file").touch()
    (said,), _ = ranks(2).run(_batches_on_rank, [tmp_path / "folder", tmp_path / "file"])
    assert said.startswith("warning: scores of unfinished batches are not kept on 1 of 2 ranks; rank 1: "), said
    assert str(tmp_path / "file") in said


def test_scores_come_back_bit_by_bit_and_only_in_the_shape_that_is_asked_for():
    data = _encode(SCORES)
    found = _decode(data, ROLLOUT, WANT)
    for field in dataclasses.fields(SCORES):
        mine, theirs = getattr(found, field.name), getattr(SCORES, field.name)
        assert (mine is None and theirs is None) or (mine.dtype == theirs.dtype and torch.equal(mine, theirs))
    assert _decode(data, ROLLOUT, dataclasses.replace(WANT, top_k=4)) is None
    assert _decode(data, ROLLOUT, dataclasses.replace(WANT, entropy=False)) is None
    assert _decode(data, dataclasses.replace(ROLLOUT, guidance_len=0, logprobs=(-0.1,) * 3), WANT) is None
    assert _decode(data[:-1], ROLLOUT, WANT) is None and _decode(b"", ROLLOUT, WANT) is None


def test_a_key_has_all_that_scores_depend_on(tmp_path):
    def key(rollout=ROLLOUT, want=WANT, identity="a"):
        return KeptScores(None, ScoreStore(tmp_path, print), who="teacher", identity=identity)._key(rollout, want)

    change, use = dataclasses.replace, TopkUse(kind="bernoulli", step=2)
    others = [
        key(identity="b"), key(want=change(WANT, top_k=4)), key(want=change(WANT, topk_use=use)),
        key(want=change(WANT, topk_use=change(use, step=3))), key(change(ROLLOUT, token_ids=(5, 6, 7, 8, 10))),
        key(change(ROLLOUT, logprobs=(-0.1, -0.2500001))), key(change(ROLLOUT, weight_version=(3, 4))),
        key(change(ROLLOUT, topk_ids=torch.zeros(2, 3, dtype=torch.int32))),
    ]  # fmt: skip
    assert len({key(), *others}) == len(others) + 1 and key() == key()


# ---- real models on ranks ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


class _Counting:
    """A scorer that notes what it is asked."""

    def __init__(self, scorer):
        self._scorer, self.submitted, self.asked = scorer, [], []

    def submit(self, step, rollouts, want):
        self.submitted += rollouts
        self._scorer.submit(step, rollouts, want)

    def scores(self, step, rollouts, want, destination):
        self.asked += rollouts
        return self._scorer.scores(step, rollouts, want, destination)


def _batches(argv, folder):
    """On this rank of two: what was asked and found in launches one after the other, in two layouts."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.data.packing import plan_packs
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.parallel.layout import ParallelLayout
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.setup.scorers import make_scorers
    from megatron_tropd.setup.stored_scores import response_parts
    from megatron_tropd.teacher.scorer import Destination

    spec = make_run_spec(parse(argv), 2)
    (every,) = response_parts(spec.data.prompts)
    rollouts = dict(enumerate(every[:10]))
    want = spec.objective.needs.score
    lengths = [len(rollout.token_ids) for rollout in rollouts.values()]

    def launch(layout, *, rollouts=rollouts, want=want, whole=True, identity="a", ends=False):
        groups = student_groups(layout)
        owners = plan_packs(lengths, data_parallel_size=layout.dp, max_tokens=48).owners
        counting, store = _Counting(make_scorers(spec, groups, ExitStack()).teacher.scorer), ScoreStore(folder, print)
        kept = KeptScores(counting, store, who="teacher", identity=identity, whole_batches=whole)
        for index in range(dist.get_rank(), len(rollouts), 2):  # each where it arrived
            kept.submit(0, {index: rollouts[index]}, want)
        found = kept.scores(0, rollouts, want, Destination(groups=groups, owners=owners))
        dist.barrier()
        if ends:
            store.clear(0)
        dist.barrier()
        numbers = {i: (s.logprob.tolist(), s.topk_logprobs.tolist(), s.hidden is None) for i, s in found.items()}
        return counting.submitted, counting.asked, numbers

    def damage():
        """Lose the last record of a file."""
        if dist.get_rank() == 0:
            path = next(path for path in sorted(folder.glob("*.scores")) if len(list(read_records(path))) > 1)
            path.write_bytes(path.read_bytes()[:-1])
        dist.barrier()

    tp, dp = ParallelLayout.for_world(2, 2, 1), ParallelLayout.for_world(2, 1, 1)
    other = rollouts | {3: dataclasses.replace(rollouts[3], weight_version=(1, 1))}
    results = {
        "first": launch(dp), "again": launch(dp), "other layout": launch(tp), "other teacher": launch(dp, identity="b"),
        "other request": launch(dp, want=dataclasses.replace(want, top_k=2)),
        "hidden": launch(dp, want=dataclasses.replace(want, hidden=True)),
        "one other": launch(dp, rollouts=other, whole=False),
    }  # fmt: skip
    for path in folder.glob("*.scores") if dist.get_rank() == 0 else ():
        path.unlink()
    dist.barrier()
    launch(dp)
    damage()
    results |= {"cut": launch(tp, whole=False, ends=True), "anew": launch(dp)}
    damage()
    return results | {"cut, all or none": launch(dp, ends=True), "left": [path.name for path in folder.glob("*")]}


@pytest.mark.slow
def test_a_scorer_is_asked_only_for_what_is_not_on_disk(ranks, world, tmp_path, measured):
    argv = flags(world, tmp_path / "run", objective="kd")
    first, second = ranks(2).run(_batches, argv, tmp_path / "scores")
    assert first.pop("left") == second.pop("left") == []
    every = list(range(10))
    anew = {"first", "other teacher", "other request", "hidden", "anew", "cut, all or none"}
    for name in first:
        (one, asked, mine), (two, asked_there, theirs) = first[name], second[name]
        assert asked == asked_there, f"{name}: every rank asks for the same"
        numbers = theirs | mine
        assert list(numbers) and sorted(numbers) == every
        if name in anew:
            assert asked == every, name
        elif name in ("again", "other layout"):
            assert not asked and not one and not two and numbers == dict(_all(first, second, "first")), name
        else:
            assert len(asked) == 1 and sorted(one + two) == asked, name
            gaps = [
                abs(a - b)
                for i in every
                for a, b in zip(numbers[i][0], _all(first, second, "first")[i][0], strict=True)
            ]
            measured(
                "scores of a batch of which some are on disk equal those of the whole batch (nats)", max(gaps), 1e-4
            )
    assert first["one other"][1] == [3]
    assert _all(first, second, "cut, all or none") == _all(first, second, "first"), "the same bits, as all are scored"
    assert not any(kept for *_, kept in _all(first, second, "hidden").values())


def _all(first, second, name):
    return second[name][2] | first[name][2]
