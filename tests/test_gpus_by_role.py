"""Which GPUs of a machine ranks, engines and teachers' servers get, and what a machine does not have."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.cli import ConfigError, make_parser, parse
from megatron_tropd.config_fields import BY_ROLE
from megatron_tropd.parallel import platform
from megatron_tropd.setup import engines, scorers
from megatron_tropd.setup.gpus import ServerGpus, assign_gpus
from megatron_tropd.setup.problems import Problems
from megatron_tropd.setup.run_spec import make_run_spec
from tests.sglang_helpers import KEYS
from tests.tiny_run import flags, make_world


@pytest.fixture
def machine(monkeypatch):
    """A machine that has eight GPUs as far as the checks can tell; nothing is started."""
    monkeypatch.setattr(platform, "is_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("TROPD_SGLANG_API_KEY", KEYS.api)
    monkeypatch.setenv("TROPD_SGLANG_ADMIN_API_KEY", KEYS.admin)

    def with_ranks(number, *, node=0, nodes=1):
        for name, value in {
            "LOCAL_WORLD_SIZE": number, "WORLD_SIZE": number * nodes, "GROUP_RANK": node, "GROUP_WORLD_SIZE": nodes,
            "MASTER_ADDR": "127.0.0.1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, str(value))

    return with_ranks


@dataclass
class _Found:
    gpus: ServerGpus
    errors: list[str]
    warnings: list[str]

    @property
    def message(self):
        assert len(self.errors) == 1, self.errors
        return self.errors[0]


def _assign(tmp_path, **changes):
    lists = {name: changes.pop(name, "").split() for name in ("rollout_gpu_ids", "teacher_gpu_ids")}
    argv = flags(tmp_path, tmp_path / "run", sglang_python=__file__, **changes)
    for name, ids in lists.items():
        argv += [f"--{name.replace('_', '-')}", *ids] if ids else []
    problems = Problems()
    return _Found(assign_gpus(parse(argv), problems), problems.errors, problems.warnings)


ENGINES = {"rollout_engine": "sglang"}
TEACHER = {"teacher_placement": "server"}


@pytest.mark.parametrize(
    ("ranks", "changes", "engines", "teacher"),
    [
        (8, {}, (), None),
        (8, {**ENGINES, "rollout_num_engines": 2, "sglang_tp_size": 2}, (0, 1, 2, 3), None),
        (4, {**ENGINES, "rollout_num_gpus_per_node": 4, "rollout_num_engines": 2, "sglang_tp_size": 2}, (4, 5, 6, 7),
         None),
        (4, {**TEACHER, "teacher_num_servers": 2, "teacher_sglang_tp_size": 2}, (), (4, 5, 6, 7)),
        (2, {**ENGINES, **TEACHER, "rollout_num_gpus_per_node": 4, "rollout_num_engines": 4,
             "teacher_sglang_tp_size": 2}, (4, 5, 6, 7), (2, 3)),
        (4, {**ENGINES, **TEACHER, "rollout_num_engines": 4}, (0, 1, 2, 3), (4,)),
        (1, {**ENGINES, **TEACHER, "rollout_num_engines": 2}, (0, 1), (2,)),
        (2, {**ENGINES, **TEACHER, "rollout_gpu_ids": "2 7", "rollout_num_engines": 2, "teacher_num_servers": 3}, (2, 7),
         (3, 4, 5)),
        (2, {**ENGINES, "rollout_engine_urls": "http://127.0.0.1:3", "rollout_num_gpus_per_node": 9}, (), None),
        (8, {**TEACHER, "teacher_urls": "http://127.0.0.1:3"}, (), None),
    ],
)  # fmt: skip
def test_roles_have_gpus_by_number(machine, tmp_path, ranks, changes, engines, teacher):
    machine(ranks)
    found = _assign(tmp_path, **changes)
    assert not found.errors and not found.warnings
    assert found.gpus == ServerGpus(engines=engines, teachers={} if teacher is None else {"teacher": teacher})


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        (5, {**ENGINES, "rollout_num_gpus_per_node": 4, "rollout_num_engines": 4},
         "--rollout-num-gpus-per-node 4 and the 5 ranks of this machine (--nproc-per-node) need 9 GPUs; it has 8: "
         "lower one of them"),
        (4, {**ENGINES, "rollout_num_gpus_per_node": 4, "rollout_num_engines": 3},
         "--rollout-num-engines 3 of --sglang-tp-size 1 need 3 GPUs, and --rollout-num-gpus-per-node gives them 4: make "
         "them equal"),
        (8, {**ENGINES, "rollout_num_engines_per_node": 2, "sglang_tp_size": 8},
         "--rollout-num-engines-per-node 2 of --sglang-tp-size 8 need 16 GPUs; this machine has 8: lower one of them"),
        (6, {**TEACHER, "teacher_num_servers": 2, "teacher_sglang_tp_size": 2},
         "--teacher-num-servers 2 of --teacher-sglang-tp-size 2 need 4 GPUs of their own; of this machine's 8 the 6 "
         "ranks (--nproc-per-node), the rollout engines and other teachers leave 2: start fewer, or name GPUs to share "
         "with --teacher-gpu-ids"),
        (2, {**ENGINES, "rollout_gpu_ids": "8 9", "rollout_num_engines": 2},
         "--rollout-gpu-ids 8 9: this machine has 8 GPUs, from 0 to 7"),
        (2, {**TEACHER, "teacher_gpu_ids": "11"}, "--teacher-gpu-ids 11: this machine has 8 GPUs, from 0 to 7"),
        (2, {**ENGINES, "rollout_gpu_ids": "3 3", "rollout_num_engines": 2},
         "--rollout-gpu-ids 3 3: a GPU is named twice; name 2 different ones"),
        (2, {**ENGINES, "rollout_gpu_ids": "x"}, "--rollout-gpu-ids x: expected numbers of GPUs, such as 4 5 6 7"),
        (2, {**ENGINES, **TEACHER, "rollout_num_gpus_per_node": 4, "rollout_num_engines": 4, "teacher_gpu_ids": "5"},
         "--teacher-gpu-ids 5: the rollout engines have the last 4 GPUs for themselves (--rollout-num-gpus-per-node); "
         "name others"),
    ],
)  # fmt: skip
def test_what_the_machine_does_not_have(machine, tmp_path, ranks, changes, message):
    machine(ranks)
    assert _assign(tmp_path, **changes).message == message


def test_gpus_may_be_shared_by_name_with_a_warning(machine, tmp_path):
    machine(1)
    found = _assign(tmp_path, **ENGINES, **TEACHER, teacher_gpu_ids="0")
    assert found.gpus == ServerGpus(engines=(0,), teachers={"teacher": (0,)}) and not found.errors
    assert (
        len(found.warnings) == 1 and "--teacher-gpu-ids 0: ranks or rollout engines are there too" in found.warnings[0]
    )


def test_several_teachers_have_gpus_one_after_the_other(machine, tmp_path):
    files = []
    for name, more in (("math", "teacher-sglang-tp-size: 2"), ("code", "teacher-gpu-ids: [4]"), ("rest", "")):
        file = tmp_path / f"{name}.yaml"
        domains = "" if name == "rest" else f"domains: [{name}]\n"
        file.write_text(f"{domains}teacher-placement: server\nteacher-hf-checkpoint: t\n{more}\n")
        files.append(str(file))
    config = parse([*flags(tmp_path, tmp_path / "run"), "--teacher-config", *files])
    machine(3)
    problems = Problems()
    gpus = assign_gpus(config, problems)
    assert gpus.teachers == {"teacher-math": (3, 5), "teacher-code": (4,), "teacher-rest": (6,)}
    assert not problems.errors and not problems.warnings
    machine(6)
    assign_gpus(config, problems)
    (error,) = problems.errors
    assert files[2] in error and "need 1 GPUs of their own" in error and "leave 0" in error
    assert problems.warnings[0].startswith(
        f"--teacher-config {files[1]}: --teacher-gpu-ids 4: ranks or rollout engines"
    )


def test_other_machines_have_engines_and_no_teacher(machine, tmp_path):
    machine(7, node=1, nodes=2)
    found = _assign(tmp_path, **ENGINES, **TEACHER, rollout_num_engines_per_node=1, teacher_num_servers=9)
    assert found.gpus == ServerGpus(engines=(0,), teachers={"teacher": ()}) and not found.errors
    machine(4, node=1, nodes=2)
    shared = {"rollout_num_engines_per_node": 4, "rollout_num_gpus_per_node": 4, "teacher_gpu_ids": "7"}
    found = _assign(tmp_path, **ENGINES, **TEACHER, **shared)
    assert not found.errors and not found.warnings, "the teacher is on another machine"
    machine(8, node=1, nodes=2)
    engines_of_rank_0 = {**ENGINES, "rollout_num_engines": 4, "rollout_num_gpus_per_node": 4}
    assert not _assign(tmp_path, **engines_of_rank_0).errors
    machine(8, nodes=2)
    assert "need 12 GPUs; it has 8" in _assign(tmp_path, **engines_of_rank_0).message


def test_without_gpus_only_names_count(tmp_path):
    assert _assign(tmp_path, **ENGINES, rollout_num_engines=99).gpus == ServerGpus()
    named = _assign(tmp_path, **ENGINES, **TEACHER, rollout_gpu_ids="77", teacher_gpu_ids="78")
    assert named.gpus == ServerGpus(engines=(77,), teachers={"teacher": (78,)}) and not named.errors


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _spec(world, run_dir, **changes):
    """The whole check of a run, as each of its two ranks makes it."""
    return make_run_spec(parse(flags(world, run_dir, **ENGINES, **TEACHER, sglang_python=__file__, **changes)), 2)


def test_servers_are_made_with_the_gpus_of_their_role(machine, world, tmp_path, monkeypatch):
    """There is no GPU here to start one on: what would start them says which settings it was given."""
    monkeypatch.setattr(engines, "SGLangPool", lambda settings, **_: settings)
    monkeypatch.setattr(scorers, "ServerScorer", lambda settings, *_, **__: settings)
    machine(2)
    changes = {"rollout_num_gpus_per_node": 4, "rollout_num_engines": 4, "teacher_num_servers": 2}
    spec = _spec(world, tmp_path / "run", student_world_size=2, **changes)
    made = engines.ENGINES["sglang"](spec, None, None, ())
    assert [made.gpus_of(index) for index in range(4)] == [(4,), (5,), (6,), (7,)]
    made = scorers.PLACEMENTS["server"](scorers.Place(spec=spec), spec.models.teachers[0])
    assert [made.gpus_of(index) for index in range(2)] == [(2,), (3,)]


def test_another_machines_keeper_starts_servers_on_its_last_gpus(machine, world, tmp_path, monkeypatch):
    machine(1, node=1, nodes=2)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # of the job, for orders
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    per_node = {"rollout_num_gpus_per_node": 4, "rollout_num_engines_per_node": 2, "sglang_tp_size": 2}
    keeper = engines.make_keeper(_spec(world, tmp_path / "run", **per_node))
    try:
        assert [keeper._settings.gpus_of(index) for index in (2, 3)] == [(4, 5), (6, 7)]
    finally:
        keeper.close()


def test_a_run_compares_its_roles_with_the_machine(machine, world, tmp_path):
    machine(2)
    with pytest.raises(ConfigError) as error:
        _spec(world, tmp_path / "run", rollout_num_gpus_per_node=7, rollout_num_engines=7, student_world_size=4)
    assert "--rollout-num-gpus-per-node 7 and the 2 ranks" in str(error.value)
    assert (
        "--student-world-size 4: torchrun started 2 ranks, so the student has 2: change one of them, or "
        "--nproc-per-node or --nnodes"
    ) in str(error.value)
    with pytest.raises(ConfigError, match=r"1 GPU ids \(--rollout-gpu-ids\) for 2 engines"):
        _spec(world, tmp_path / "run", rollout_gpu_ids="5", rollout_num_engines=2)


def test_ranks_of_the_student_beside_those_of_a_teacher(world, tmp_path):
    dedicated = {"teacher_placement": "dedicated", "teacher_world_size": 2}
    argv = flags(world, tmp_path / "run", student_world_size=2, **dedicated)
    assert [role.size for role in make_run_spec(parse(argv), 4).roles] == [2, 2]
    with pytest.raises(ConfigError, match=r"started 8 ranks, of which 2 are teachers' \(--teacher-world-size\), so"):
        make_run_spec(parse(argv), 8)


def test_the_flags_stand_together_in_the_help():
    groups = {group.title: group for group in make_parser()._action_groups}
    assert {option for action in groups[BY_ROLE]._group_actions for option in action.option_strings} == {
        "--student-world-size", "--teacher-world-size", "--teacher-num-servers", "--teacher-gpu-ids",
        "--rollout-num-engines", "--rollout-num-engines-per-node", "--rollout-num-gpus-per-node", "--rollout-gpu-ids",
    }  # fmt: skip
