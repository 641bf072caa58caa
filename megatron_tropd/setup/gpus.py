"""Which GPUs of this machine the ranks, the rollout engines and each teacher's servers have.

The ranks have the first, one each.  The engines share them, or have the machine's last for themselves
(--rollout-num-gpus-per-node).  A teacher's servers have those between.  GPUs that are named (--rollout-gpu-ids,
--teacher-gpu-ids) may be shared, with a warning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_tropd.config import TrainConfig
from megatron_tropd.parallel import platform
from megatron_tropd.parallel.roles import node
from megatron_tropd.setup.problems import Problems
from megatron_tropd.sglang.server_flags import ENGINE_FLAGS, TEACHER_FLAGS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerGpus:
    """GPUs of the servers that run on this machine, by number as this process sees them; () leaves them to SGLang."""

    engines: tuple[int, ...] = ()
    teachers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By the role of a teacher whose servers are started."""

    def of_teacher(self, role: str) -> tuple[int, ...]:
        """GPUs of the servers of the teacher ``role``."""
        return self.teachers.get(role, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Machine:
    gpus: int
    ranks: int
    """Ranks of the job on it."""


def assign_gpus(config: TrainConfig, problems: Problems) -> ServerGpus:
    """Return the GPUs of each role's servers, and note what the machine does not have.

    Without GPUs only what the flags name is returned, and nothing is compared.
    """
    machine, before = _this_machine(), len(problems.errors)
    named_engines = problems.attempt(lambda: _numbers(config.engine.rollout_gpu_ids, ENGINE_FLAGS.gpu_ids)) or ()
    named: dict[str, tuple[int, ...]] = {}
    for role, own in _serving(config).items():
        with problems.named(config.file_of(role)):
            ids = own.teacher.teacher_gpu_ids
            named[role] = problems.attempt(lambda ids=ids: _numbers(ids, TEACHER_FLAGS.gpu_ids)) or ()  # type: ignore[misc]
    if machine is None or len(problems.errors) > before:
        return ServerGpus(engines=named_engines, teachers=named)
    engines = _engines(config, named_engines, machine, problems) if _starts_engines(config) else named_engines
    if node() == 0:  # the teachers' servers are here
        _check_shared(config, machine, engines, named, problems)
        named = _teachers(config, machine, engines, named, problems)
    return ServerGpus(engines=engines, teachers=named)


def _this_machine() -> _Machine | None:
    if not platform.is_cuda():
        return None
    return _Machine(gpus=torch.cuda.device_count(), ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _numbers(given: Sequence[str], flag: str) -> tuple[int, ...]:
    """Return the numbers of GPUs that ``flag`` names.

    Raises:
        ValueError: a word is no number, or one is there twice.
    """
    if wrong := [gpu for gpu in given if not gpu.isdecimal()]:
        raise ValueError(f"{flag} {' '.join(wrong)}: expected numbers of GPUs, such as 4 5 6 7")
    numbers = tuple(map(int, given))
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{flag} {' '.join(given)}: a GPU is named twice; name {len(numbers)} different ones")
    return numbers


def _starts_engines(config: TrainConfig) -> bool:
    """Whether this run starts engines on this machine: on every one, or on that of rank 0."""
    engine = config.engine
    here = engine.rollout_num_engines_per_node or node() == 0
    return bool(engine.rollout_engine == "sglang" and not engine.rollout_engine_urls and here)


def _serving(config: TrainConfig) -> dict[str, TrainConfig]:
    """Return the teachers, by role, whose servers this run starts."""
    return {
        role: own
        for role, own in config.by_teacher.items()
        if own.teacher.teacher_placement == "server" and not own.teacher.teacher_urls
    }


def _engines(
    config: TrainConfig, named: tuple[int, ...], machine: _Machine, problems: Problems
) -> tuple[int, ...]:  # fmt: skip
    """Return the GPUs named, the machine's last if the engines have some for themselves, or the first, the ranks'."""
    if named:
        _check_exist(named, ENGINE_FLAGS.gpu_ids, machine, problems)
        return named
    engine = config.engine
    number = engine.rollout_num_engines_per_node or engine.rollout_num_engines
    need = number * engine.sglang_tp_size
    flag = "--rollout-num-engines-per-node" if engine.rollout_num_engines_per_node else "--rollout-num-engines"
    what = f"{flag} {number} of --sglang-tp-size {engine.sglang_tp_size} need {need} GPUs"
    if alone := engine.rollout_num_gpus_per_node:
        problems.require(need == alone, f"{what}, and --rollout-num-gpus-per-node gives them {alone}: make them equal")
        problems.require(
            machine.ranks + alone <= machine.gpus,
            f"--rollout-num-gpus-per-node {alone} and the {machine.ranks} ranks of this machine (--nproc-per-node) "
            f"need {machine.ranks + alone} GPUs; it has {machine.gpus}: lower one of them",
        )
        return tuple(range(max(machine.gpus - alone, 0), machine.gpus))
    problems.require(need <= machine.gpus, f"{what}; this machine has {machine.gpus}: lower one of them")
    return tuple(range(need))


def _teachers(
    config: TrainConfig, machine: _Machine, engines: Sequence[int], named: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Return the GPUs of each teacher's servers: those named, or the next that nobody has."""
    taken = {*range(machine.ranks), *engines, *(gpu for gpus in named.values() for gpu in gpus)}
    free = [gpu for gpu in range(machine.gpus) if gpu not in taken]
    given: dict[str, tuple[int, ...]] = {}
    for role, own in _serving(config).items():
        with problems.named(config.file_of(role)):
            if named[role]:
                given[role] = named[role]
                _check_exist(named[role], TEACHER_FLAGS.gpu_ids, machine, problems)
                continue
            number, tp = own.teacher.teacher_num_servers, own.teacher.teacher_sglang_tp_size
            problems.require(
                number * tp <= len(free),
                f"--teacher-num-servers {number} of --teacher-sglang-tp-size {tp} need {number * tp} GPUs of their "
                f"own; of this machine's {machine.gpus} the {machine.ranks} ranks (--nproc-per-node), the rollout "
                f"engines and other teachers leave {len(free)}: start fewer, or name GPUs to share with "
                f"{TEACHER_FLAGS.gpu_ids}",
            )
            given[role], free = tuple(free[: number * tp]), free[number * tp :]
    return given


def _check_exist(gpus: Sequence[int], flag: str, machine: _Machine, problems: Problems) -> None:
    absent = [str(gpu) for gpu in gpus if gpu >= machine.gpus]
    problems.require(
        not absent, f"{flag} {' '.join(absent)}: this machine has {machine.gpus} GPUs, from 0 to {machine.gpus - 1}"
    )


def _check_shared(
    config: TrainConfig, machine: _Machine, engines: Sequence[int], named: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> None:  # fmt: skip
    """Refuse what takes GPUs that the engines have for themselves, and warn of others that are shared by name."""
    alone = config.engine.rollout_num_gpus_per_node if _starts_engines(config) else 0
    for role, gpus in named.items():
        with problems.named(config.file_of(role)):
            both = _words({*engines} & {*gpus})
            problems.require(
                not (alone and both),
                f"{TEACHER_FLAGS.gpu_ids} {both}: the rollout engines have the last {alone} GPUs for themselves "
                "(--rollout-num-gpus-per-node); name others",
            )
            if shared := _words({*engines, *range(machine.ranks)} & {*gpus}):
                problems.warnings.append(
                    f"{TEACHER_FLAGS.gpu_ids} {shared}: ranks or rollout engines are there too; keep the servers' "
                    "memory low enough for all: --teacher-sglang-mem-fraction-static, --sglang-mem-fraction-static"
                )


def _words(gpus: set[int]) -> str:
    return " ".join(map(str, sorted(gpus)))
