"""Every placement and layout of the teacher, to students in every layout: the same scores of the same rollouts, and the
same first updates.

TP, PP and EP of the teacher and TP and PP of the student are 1 or 2, and ranks that are left are data parallel.  A teacher on
servers has the server's layout, so that only the student's varies: test_teacher_server.py.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import cache, partial
from itertools import product

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.parallel.layout import ParallelLayout
from tests.ranks import RankPool, serve
from tests.tiny_run import flags, make_world, reports_here

pytestmark = pytest.mark.slow

SIDE = 4
"""Ranks of the student, and of the teacher: the same ones, or as many of its own."""
TOLERANCE = 1e-5
STUDENTS = {
    f"TP{tp} PP{pp}": ParallelLayout(tp=tp, pp=pp, dp=SIDE // (tp * pp)) for tp, pp in product((1, 2), repeat=2)
}
STEPS = 3


def _teacher_flags(tp: int, pp: int, ep: int) -> dict[str, int]:
    """Of a layout on SIDE ranks.  Where no data-parallel ranks are left, experts are not cut but spread over TP."""
    found = {"tensor_model": tp, "pipeline_model": pp, "expert_model": ep}
    if tp * pp * ep > SIDE:
        found["expert_tensor"] = 1
    return {f"teacher_{name}_parallel_size": size for name, size in found.items()}


TEACHERS = {
    f"{family} TP{tp} PP{pp} EP{ep}": (family, _teacher_flags(tp, pp, ep))
    for family, experts in (("llama", (1,)), ("qwen3_moe", (1, 2)))
    for tp, pp, ep in product((1, 2), (1, 2), experts)
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """By family of the teacher; the data is the same."""
    return {
        family: make_world(tmp_path_factory.mktemp(family), teacher=family, kv_heads=4)
        for family in ("llama", "qwen3_moe")
    }


@pytest.fixture(scope="module")
def two_worlds():
    """SIDE ranks of a student and SIDE ranks of a teacher."""
    pool = RankPool(2 * SIDE, serve=partial(serve, teacher_ranks=SIDE))
    yield pool
    pool.close()


@cache
def _spec(argv):
    from megatron_tropd.cli import parse
    from megatron_tropd.setup.run_spec import make_run_spec

    return make_run_spec(parse(argv), int(os.environ["WORLD_SIZE"]))


def _argv(worlds, directory, name, **changes):
    family, layout = TEACHERS[name]
    return tuple(flags(worlds[family], directory, objective="kd", **layout, **changes))


def _rollouts(spec):
    """The responses of the data, which scores in files can be of too."""
    from megatron_tropd.setup.stored_scores import response_parts

    (rollouts,) = response_parts(spec.data.prompts)
    return rollouts


def _delivered(scorer, spec, groups, step=0):
    """(log-probabilities, top-k ids, their log-probabilities) by index of the rollouts that this rank trains on."""
    from megatron_tropd.data.packing import plan_packs
    from megatron_tropd.teacher.scorer import Destination

    rollouts, want, coords = dict(enumerate(_rollouts(spec))), spec.objective.needs.score, groups.coords
    lengths = [len(rollout.token_ids) for rollout in rollouts.values()]
    owners = plan_packs(lengths, data_parallel_size=groups.layout.dp, max_tokens=48).owners
    for index in range(dist.get_rank(), len(rollouts), dist.get_world_size()):  # each where it arrived
        scorer.submit(step, {index: rollouts[index]}, want)
    dist.barrier()  # scores are asked for when every rank knows the whole batch
    scores = scorer.scores(step, rollouts, want, Destination(groups=groups, owners=owners))
    mine = {i for i in range(len(rollouts)) if groups.is_last_stage and owners[i] == coords.dp}
    assert scores.keys() == mine, "a rank got scores that it does not train on, or misses some"
    return {i: tuple(x.numpy() for x in (s.logprob, s.topk_ids, s.topk_logprobs)) for i, s in scores.items()}


def _colocated(argv):
    """What arrives in every layout of the student."""
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.setup.scorers import make_scorers

    found = []
    for layout in STUDENTS.values():
        groups = student_groups(layout)
        scorers = make_scorers(_spec(argv), groups, ExitStack())
        found.append(_delivered(scorers.teacher.scorer, _spec(argv), groups))
    return found


def _of_job(argv, number, on_student):
    """``on_student()`` on the student's ranks, while those of the teacher serve; [] there."""
    from megatron_tropd.parallel.roles import TRAINER, job_of_environment
    from megatron_tropd.setup.same_configuration import check_same_configuration
    from megatron_tropd.setup.teacher_world import make_worker

    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # names of the store are new, as after torchrun's restart
    spec = _spec(argv)
    job = job_of_environment(spec.roles)
    if job.role.name == TRAINER:
        check_same_configuration(spec.config, job)
        return on_student()
    make_worker(spec, job).serve()
    return []


def _dedicated(argv, number):
    return _of_job(argv, number, partial(_from_dedicated, argv))


def _from_dedicated(argv):
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.setup.scorers import make_scorers

    first, *others = STUDENTS.values()
    groups = student_groups(first)
    scorer = make_scorers(_spec(argv), groups, ExitStack()).teacher.scorer
    try:
        found = [_delivered(scorer, _spec(argv), groups)]
        for step, layout in enumerate(others, 1):
            found.append(_delivered(scorer, _spec(argv), student_groups(layout), step))
    finally:
        scorer.close()  # the teacher's ranks stop serving
    return found


def _stored(argv, directory):
    from megatron_tropd.parallel.groups import student_groups
    from megatron_tropd.setup.response_scores import score_responses
    from megatron_tropd.teacher.stored.files import ScoreFiles
    from megatron_tropd.teacher.stored.scorer import StoredScorer

    score_responses(_spec(argv), directory, lambda _: None)
    scorer = StoredScorer(ScoreFiles(directory))
    return [_delivered(scorer, _spec(argv), student_groups(layout)) for layout in STUDENTS.values()]


@pytest.fixture(scope="module")
def expected(worlds, tmp_path_factory):
    """By family: (log-probabilities, top-k ids, their log-probabilities) of every rollout, by transformers."""
    from transformers import AutoModelForCausalLM

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.run_spec import make_run_spec

    found = {}
    for family, world in worlds.items():
        spec = make_run_spec(parse(flags(world, tmp_path_factory.mktemp("run"), objective="kd")), 1)
        model = AutoModelForCausalLM.from_pretrained(world / "teacher", dtype=torch.float32).eval()
        found[family] = [_by_transformers(model, rollout, spec.objective.needs.top_k) for rollout in _rollouts(spec)]
    return found


@torch.no_grad()
def _by_transformers(model, rollout, top_k):
    logits = model(torch.tensor([rollout.token_ids])).logits[0, rollout.prompt_len - 1 : -1]
    log_q = logits.double().log_softmax(-1)
    own = log_q.gather(1, torch.tensor(rollout.token_ids[rollout.prompt_len :])[:, None])[:, 0]
    top = log_q.topk(top_k)
    return own.numpy(), top.indices.numpy(), top.values.numpy()


def _worst(results, expected):
    """The largest difference of a log-probability, over all of the student's layouts; top-k ids must be the same."""
    worst = 0.0
    students = [student for rank in results if rank for student in zip(STUDENTS, rank, strict=True)]
    for name in STUDENTS:
        arrived = [scores for student, scores in students if student == name]
        assert set().union(*arrived) == set(range(len(expected))), f"student {name}: rollouts without scores"
        for index, (logprob, ids, logprobs) in (item for scores in arrived for item in scores.items()):
            own, top_ids, top = expected[index]
            assert (ids == top_ids).all(), f"student {name}: other top-k ids"
            worst = max(worst, abs(logprob - own).max(), abs(logprobs - top).max())
    return float(worst)


@pytest.mark.parametrize("name", TEACHERS)
def test_scores_of_a_colocated_teacher(ranks, worlds, expected, tmp_path, measured, name):
    results = ranks(SIDE).run(_colocated, _argv(worlds, tmp_path, name))
    error = _worst(results, expected[TEACHERS[name][0]])
    measured("scores of a colocated teacher, all layouts (nats, max abs)", error, TOLERANCE)


def test_another_teacher_is_found(ranks, worlds, expected, tmp_path):
    """Negative control: the comparison can fail."""
    results = ranks(SIDE).run(_colocated, _argv(worlds, tmp_path, "llama TP2 PP2 EP1"))
    with pytest.raises(AssertionError, match="other top-k ids"):
        _worst(results, expected["qwen3_moe"])


@pytest.mark.parametrize("name", TEACHERS)
def test_scores_of_a_dedicated_teacher(two_worlds, worlds, expected, tmp_path, measured, name):
    argv = _argv(worlds, tmp_path, name, teacher_placement="dedicated", teacher_world_size=SIDE)
    results = two_worlds.run(_dedicated, argv, list(TEACHERS).index(name))
    error = _worst(results, expected[TEACHERS[name][0]])
    measured("scores of a dedicated teacher, all layouts (nats, max abs)", error, TOLERANCE)


@pytest.mark.parametrize("name", TEACHERS)
def test_scores_in_files(ranks, worlds, expected, tmp_path, measured, name):
    results = ranks(SIDE).run(_stored, _argv(worlds, tmp_path, name), tmp_path / "scores")
    error = _worst(results, expected[TEACHERS[name][0]])
    measured("stored scores, all layouts (nats, max abs)", error, TOLERANCE)


# placement, student TP and PP, teacher TP, PP and EP: every value of each with every value of each other, twice
UPDATES = [
    (("colocated", "dedicated")[b ^ c], 1 + a, 1 + b, 1 + c, 1 + (a ^ b), 1 + (a ^ c))
    for a, b, c in product((0, 1), repeat=3)
]


def _updates(argv, number):
    """Reports of a run, on the student's ranks."""
    return _of_job(argv, number, partial(reports_here, argv))


def _numbers(reports):
    return [(r.loss, r.grad_norm, r.metrics["teacher/logprob_mean"]) for r in reports]


def _run_flags(world, directory, tp, pp, **changes):
    student = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    return tuple(flags(world, directory, train_iters=STEPS, **student, **changes))


@pytest.fixture(scope="module")
def on_one_rank(ranks, worlds, tmp_path_factory):
    """Updates by objective with a colocated teacher, on one rank."""
    found = {}
    for objective in ("tropd", "kd"):
        argv = _run_flags(worlds["qwen3_moe"], tmp_path_factory.mktemp("run"), 1, 1, objective=objective)
        found[objective] = _numbers(ranks(1).run(reports_here, argv)[0])
    return found


def _check(measured, claim, mine, theirs):
    assert len(mine) == len(theirs) == STEPS
    worst = max(abs(a - b) / abs(b) for m, t in zip(mine, theirs, strict=True) for a, b in zip(m, t, strict=True))
    measured(f"three updates, {claim} (loss, gradient norm and teacher's log-probability, relative)", worst, TOLERANCE)


@pytest.mark.parametrize("case", UPDATES, ids=lambda case: "{} student TP{} PP{} teacher TP{} PP{} EP{}".format(*case))
def test_first_updates_are_those_of_one_rank(ranks, two_worlds, worlds, on_one_rank, tmp_path, measured, case):
    placement, tp, pp, *teacher = case
    apart = {"teacher_placement": placement, "teacher_world_size": SIDE} if placement == "dedicated" else {}
    argv = _run_flags(worlds["qwen3_moe"], tmp_path, tp, pp, **_teacher_flags(*teacher), **apart)
    pool, number = (two_worlds, len(TEACHERS) + UPDATES.index(case)) if apart else (ranks(SIDE), 0)
    _check(measured, f"teacher {placement}", _numbers(pool.run(_updates, argv, number)[0]), on_one_rank["tropd"])


def test_first_updates_from_files_are_those_of_one_rank(ranks, worlds, on_one_rank, tmp_path, measured):
    """Scores by a teacher of TP 2, PP 2 and EP 2; the student's other layouts are in test_stored_scores.py."""
    argv = _argv(worlds, tmp_path / "teacher", "qwen3_moe TP2 PP2 EP2")
    ranks(SIDE).run(_stored, argv, tmp_path / "scores")
    changes = {"objective": "kd", "teacher_placement": "file", "teacher_scores": tmp_path / "scores"}
    argv = _run_flags(worlds["qwen3_moe"], tmp_path / "run", 2, 2, **changes)
    _check(measured, "stored scores", _numbers(ranks(SIDE).run(reports_here, argv)[0]), on_one_rank["kd"])
