"""Several teachers: which scores what, mixtures, and runs with them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_tropd.cli import ConfigError, parse
from megatron_tropd.reporting.run_directory import RunDirectory
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.teacher.several.scorer import SeveralTeachers
from megatron_tropd.teacher.several.shares import Shares
from megatron_tropd.teacher_config import NamedTeacher, TeacherConfig
from megatron_tropd.teacher_files import file_of_teacher
from megatron_tropd.types import Rollout, ScoreRequest, TopkUse
from tests.tiny_run import add_second_teacher, flags, make_world, reports_here
from tests.torchrun_jobs import output_of

STEPS = 3
TOLERANCE = 1e-5


def _named(name, domains=(), weight=1.0):
    return NamedTeacher(
        name=name, file=f"{name}.yaml", domains=tuple(domains), weight=weight, settings=TeacherConfig(), sglang_flags={}
    )


def test_a_domain_is_scored_by_those_that_name_it_and_the_rest_by_the_others():
    shares = Shares(
        [_named("code", ["code"]), _named("large", weight=3), _named("small"), _named("both", ["code", "a"])]
    )
    assert shares.of("code") == {"code": 0.5, "both": 0.5} and shares.of("a") == {"both": 1.0}
    assert shares.of("math") == shares.of("") == {"large": 0.75, "small": 0.25}
    assert shares.mixed == {"code", "both", "large", "small"} and set(shares.named) == {"code", "a"}
    assert Shares([_named("code", ["code"])]).of("math") == {}
    assert not Shares([_named("code", ["code"]), _named("rest")]).mixed


# ---- the files ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """As of all tiny runs, with two teachers and two domains."""
    root = make_world(tmp_path_factory.mktemp("world"))
    add_second_teacher(root)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["domain"] = ("math", "code", "code")[number % 3]
    (root / "domains.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def _files(directory, **texts):
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name}.yaml").write_text(text)
    return [str(directory / f"{name}.yaml") for name in texts]


def _flags(world, run_dir, files, **changes):
    argv = flags(world, run_dir, **{"prompt_data": world / "domains.jsonl", "teacher_hf_checkpoint": None, **changes})
    return [*argv, "--teacher-config", *files]


def _two(world, directory, *, first="", second=""):
    return _files(
        directory,
        math=f"domains: [math]\nteacher-hf-checkpoint: {world / 'teacher'}\n{first}",
        code=f"domains: [code]\nteacher-hf-checkpoint: {world / 'second'}\n{second}",
    )


def test_a_file_says_what_a_flag_says_and_the_runs_flags_are_its_defaults(world, tmp_path):
    files = _two(world, tmp_path / "t", second="weight: 2\nteacher-offload: false\nteacher-sglang-x: [1, 2]\n")
    config = parse(_flags(world, tmp_path / "run", files, teacher_offload=True))
    assert [(one.name, one.domains, one.weight) for one in config.teachers] == [
        ("math", ("math",), 1),
        ("code", ("code",), 2),
    ]
    math, code = config.by_teacher.values()
    assert math.teacher.teacher_offload and not code.teacher.teacher_offload
    assert code.teacher.teacher_hf_checkpoint == str(world / "second") and code.teacher_sglang_flags == {
        "x": ("1", "2")
    }
    spec = make_run_spec(config, 1)
    again = parse(_flags(world, tmp_path / "run", _written(config, tmp_path), teacher_offload=True))
    assert list(map(_without_paths, again.teachers)) == list(map(_without_paths, config.teachers))
    assert list(spec.models.by_role) == ["student", "teacher-math", "teacher-code"]
    assert [teacher.layout.pp for teacher in spec.models.teachers] == [1, 1]


def _without_paths(one):
    return replace(one, file="", settings=replace(one.settings, teacher_config=[]))


def _written(config, tmp_path):
    """The files that a run of ``config`` keeps."""
    with RunDirectory.create(tmp_path / "kept", config={}, resume=False) as directory:
        for one in config.teachers:
            directory.teacher(one.name, file_of_teacher(one))
    return [str(tmp_path / "kept" / "teachers" / f"{one.name}.yaml") for one in config.teachers]


BAD_FILES = {
    "misspelled server flag": ({"a": "teacher-sglang-tp-siz: 2"}, {}, "a.yaml: unknown flag --teacher-sglang-tp-siz; did you mean"),
    "no rank is left": ({"a": "teacher-placement: dedicated\nteacher-world-size: 6"}, {}, "--teacher-world-size 6 leaves no rank"),
    "unknown key": ({"a": "teacher-lode: x"}, {}, "a.yaml: unknown key teacher-lode; expected domains, weight or a flag"),
    "wrong type": ({"a": "weight: much"}, {}, "a.yaml: weight: 'much' is not a number"),
    "no weight": ({"a": "weight: 0"}, {}, "a.yaml: weight 0 must be positive"),
    "of the run": ({"a": "teacher-topk-margin: 1"}, {}, "teacher-topk-margin is the same for all teachers"),
    "bad name": ({"A b": ""}, {}, "the file's name is the teacher's, in metrics and directories"),
    "no model": ({"a": ""}, {}, "a.yaml: the teacher is missing: give --teacher-hf-checkpoint DIR"),
    "out of range": ({"a": "teacher-num-servers: 0"}, {}, "a.yaml: --teacher-num-servers 0 must be at least 1"),
    "world size": ({"a": "teacher-placement: dedicated"}, {}, "a.yaml: --teacher-placement dedicated needs --teacher-world-size"),
    "whole distributions": ({"a": "", "b": ""}, {"objective": "full_rkl"}, "compares with the full distribution of one teacher"),
    "entropy of a mixture": (
        {"a": "", "b": ""}, {"objective": "eopd"}, "needs the teacher's entropy, which a mixture does not have (a, b score"
    ),
    "same servers": (
        {"a": "teacher-placement: server\nteacher-urls: http://127.0.0.1:1", "b": "teacher-placement: server\nteacher-urls: http://127.0.0.1:1"},
        {}, "several teachers have teacher-urls http://127.0.0.1:1: give each its own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_mistakes_in_files_are_told(world, tmp_path, name):
    texts, changes, message = BAD_FILES[name]
    with pytest.raises(ConfigError) as found:
        make_run_spec(parse(_flags(world, tmp_path / "run", _files(tmp_path / "t", **texts), **changes)), 1)
    assert message in str(found.value), found.value


def test_a_file_that_is_missing_or_twice_is_told(world, tmp_path):
    files = _two(world, tmp_path / "t")
    other = _files(tmp_path / "u", math="")
    with pytest.raises(ConfigError, match="has the same name; rename one") as found:
        parse(_flags(world, tmp_path / "run", [*files, *other, str(tmp_path / "no.yaml")]))
    assert "no.yaml: No such file" in str(found.value)


def test_a_prompt_that_nobody_scores_and_a_domain_without_prompts_are_told(world, tmp_path):
    files = _files(tmp_path / "t", one=f"domains: [math, law]\nteacher-hf-checkpoint: {world / 'teacher'}")
    with pytest.raises(ConfigError) as found:
        make_run_spec(parse(_flags(world, tmp_path / "run", files)), 1)
    assert "no teacher scores the 16 prompts of domain 'code'; name it in `domains` of one" in str(found.value)
    both = [*files, *_files(tmp_path / "t", rest=f"teacher-hf-checkpoint: {world / 'second'}")]
    spec = make_run_spec(parse(_flags(world, tmp_path / "run", both)), 1)
    assert any("no prompt is of domain 'law'" in warning for warning in spec.warnings)


# ---- what goes where ----


class _Recording:
    """A teacher that keeps what it is told."""

    def __init__(self):
        self.submitted = []

    def submit(self, step, rollouts, want):
        self.submitted.append((step, sorted(rollouts), want))


def test_rollouts_go_to_the_teachers_of_their_domain_and_mixtures_get_every_top_k():
    rollouts = {
        index: Rollout(
            prompt_uid=uid, sample_index=0, token_ids=(3, 4), prompt_len=1, guidance_len=0, logprobs=(-1.0,),
            weight_version=(0, 0), finish="stop",
        )
        for index, uid in ((4, 0), (5, 1), (9, 2))
    }  # fmt: skip
    parts = {name: _Recording() for name in ("a", "b", "c")}
    shares = Shares([_named("a", ["x"]), _named("b", ["x", "y"]), _named("c")])
    several = SeveralTeachers(parts, shares, lambda uid: "xyz"[uid])
    want = ScoreRequest(top_k=2, topk_use=TopkUse(kind="bernoulli"))
    several.submit(3, rollouts, want)
    whole = ScoreRequest(top_k=2)
    assert parts["a"].submitted == [(3, [4], whole)] and parts["b"].submitted == [(3, [4, 5], whole)]
    assert parts["c"].submitted == [(3, [9], want)]


# ---- runs ----


def _worst(mine, theirs):
    pairs = zip(mine, theirs, strict=True)
    return max(abs(getattr(a, n) - getattr(b, n)) / abs(getattr(b, n)) for a, b in pairs for n in ("loss", "grad_norm"))


SPLITS = {
    "by domain": ("domains: [math]\n", "domains: [code]\n"),
    "mixture of equals": ("weight: 1\n", "weight: 3\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPLITS)
def test_two_copies_of_a_teacher_are_the_teacher(ranks, world, tmp_path, measured, name):
    """Domains, weights, top-k and the way of the scores: with one model behind all, nothing may change.  The whole
    vocabulary as top-k, so that a mixture leaves nothing out."""
    model = f"teacher-hf-checkpoint: {world / 'teacher'}\n"
    files = _files(tmp_path / "t", **{n: text + model for n, text in zip(("one", "two"), SPLITS[name], strict=True)})
    cut = "tensor" if name == "by domain" else "context"
    changes = {
        "train_iters": STEPS,
        "top_k": 100,
        f"{cut}_{'model_' * (cut == 'tensor')}parallel_size": 2,
        "num_minibatches": 2,
    }
    single = flags(world, tmp_path / "a", prompt_data=world / "domains.jsonl", **changes)
    several = _flags(world, tmp_path / "b", files, **changes)
    pool = ranks(4)
    expected, found = pool.run(reports_here, single)[0], pool.run(reports_here, several)[0]
    measured(
        f"loss and gradient norm with two teachers that are one, {name} (relative)", _worst(found, expected), TOLERANCE
    )
    rollouts = sum(found[0].metrics.get(f"teacher/{part}/rollouts", 0) for part in ("one", "two"))
    assert rollouts == (8 if name == "by domain" else 16)
    assert found[0].metrics["teacher/two/logprob_mean"] < 0 and "teacher/two/reward_mean" in found[0].metrics


@pytest.mark.slow
def test_each_teacher_scores_its_own_domain_wherever_it_is(ranks, world, tmp_path, measured):
    """Two different teachers: on the student's ranks, and on ranks of their own, each in its own layout."""
    here = _flags(world, tmp_path / "here", _two(world, tmp_path / "t"), train_iters=STEPS)
    expected = ranks(1).run(reports_here, here)[0]
    own = "teacher-placement: dedicated\nteacher-world-size: 2\nteacher-{}-model-parallel-size: 2\n"
    files = _two(world, tmp_path / "u", first=own.format("tensor"), second=own.format("pipeline"))
    output = output_of(_flags(world, tmp_path / "there", files, train_iters=STEPS), tmp_path, ranks=5)
    assert "torchrun exited with 0" in output, output
    lines = [json.loads(line) for line in (tmp_path / "there" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    worst = max(
        abs(step[key] - getattr(report, key)) / abs(getattr(report, key))
        for step, report in zip(steps, expected, strict=True)
        for key in ("loss", "grad_norm")
    )
    measured("two teachers on ranks of their own against the student's (relative)", worst, TOLERANCE)
    for step, report in zip(steps, expected, strict=True):
        for name in ("math", "code"):
            key = f"teacher/{name}/logprob_mean"
            assert step["metrics"].get(key) == pytest.approx(report.metrics.get(key), rel=1e-5)
    assert any(f"teacher/{name}/busy_frac" in steps[-1]["metrics"] for name in ("math", "code"))
    assert sorted(path.name for path in (tmp_path / "there" / "teachers").iterdir()) == ["code.yaml", "math.yaml"]


@pytest.mark.slow
def test_a_resumed_run_keeps_who_scores_what(ranks, world, tmp_path):
    pool = ranks(1)
    files = _two(world, tmp_path / "t")
    argv = _flags(world, tmp_path / "run", files, train_iters=2, save_interval=1)
    pool.run(reports_here, argv, 1)
    _two(world, tmp_path / "t", second="teacher-offload: true\n")  # how it is held may change
    assert len(pool.run(reports_here, argv)[0]) == 1
    argv = _flags(world, tmp_path / "run", files, train_iters=3, save_interval=1)
    _files(
        tmp_path / "t", math=f"teacher-hf-checkpoint: {world / 'teacher'}\n",
        code=f"domains: [code]\nteacher-hf-checkpoint: {world / 'teacher'}\n",
    )  # fmt: skip
    with pytest.raises(Exception, match="belongs to another experiment") as found:
        pool.run(reports_here, argv)
    text = str(found.value)
    assert "--teacher-config math domains: math -> (none)" in text, text
    assert "--teacher-config code teacher-hf-checkpoint: " in text and "-offload" not in text, text


def test_weights_of_a_mixture_are_checked_in_float64():
    """The shares of a prompt sum to 1 whatever the weights are."""
    shares = Shares([_named("a", weight=1e-3), _named("b", weight=7.0), _named("c", weight=0.1)])
    assert sum(shares.of("x").values()) == pytest.approx(1.0, abs=1e-15)
    assert torch.tensor(list(shares.of("x").values())).min() > 0
