"""Section h: a teacher that is in host memory between its uses: memory, seconds of a move, equal scores."""

from __future__ import annotations

import torch

from megatron_tropd.parallel.groups import teacher_groups
from megatron_tropd.parallel.host_offload import HostOffload
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.teacher.scorer import Destination
from megatron_tropd.types import TeacherScores

from .device import GB, clocked, one_rank, peak_gb
from .flops import num_parameters
from .report import Report, free_memory
from .setting import Setting
from .shapes import QWEN3_4B, TINY
from .step_calls import Work, config_of, given_rollouts, make_teacher, objective_of, plan_of

REAL = Work(sequences=4, prompt=96, response=2000, max_tokens=8384, chunk=4096, top_k=64)
TINY_WORK = Work(sequences=3, prompt=5, response=11, max_tokens=32, chunk=16, top_k=8)
LEFT_GB = 0.5
"""Of a teacher that is in host memory, on the GPU: tables of positions, and what a library keeps."""


def run(report: Report, setting: Setting) -> None:
    """See the module."""
    groups, frozen = one_rank(), teacher_groups(ParallelLayout())
    arch, work = (TINY, TINY_WORK) if setting.tiny else (QWEN3_4B, REAL)
    config, title = config_of(work, bf16=setting.cuda), f"teacher {'tiny' if setting.tiny else '4B'}"
    rollouts = given_rollouts(work, arch.vocab_size)
    plan = plan_of(rollouts, config, groups)

    def scores(teacher: MegatronTeacher) -> dict[int, TeacherScores]:
        destination = Destination(groups=groups, owners=plan.owners)
        return teacher.score(dict(enumerate(rollouts)), objective_of(work).needs.score, destination)

    expected = scores(make_teacher(arch, frozen, config, 0, version=1))
    free_memory()
    before = _allocated()
    teacher = make_teacher(arch, frozen, config, 0, version=1, offload=True)
    held, moves = _allocated(), _timed_moves(teacher)
    found, peak = peak_gb(lambda: scores(teacher))
    _report_equal(report, title, expected, found)
    if not setting.cuda:
        report.not_run(f"{title}: memory and moves", "without a GPU nothing is gained")
        return
    counted = 2 * num_parameters(arch) / GB
    report.limit(f"{title}: GPU memory that it holds when it is built", held - before, LEFT_GB, form=".2f", unit=" GB")
    report.measured(
        f"{title}: GPU memory while it scores", (peak or 0.0) - before, unit=" GB",
        reason=f"its weights are {counted:.2f} GB by counting",
    )  # fmt: skip
    report.limit(
        f"{title}: GPU memory that it holds after scoring", _allocated() - before, LEFT_GB, form=".2f", unit=" GB"
    )
    if not moves:
        report.not_run(f"{title}: seconds of a move", "MegatronTeacher keeps no HostOffload any more")
    for seconds in moves:
        report.measured(f"{title}: copy to the GPU", seconds, unit=" s", reason=f"{counted / seconds:.1f} GB/s")


def _allocated() -> float:
    return torch.cuda.memory_allocated() / GB if torch.cuda.is_available() else 0.0


def _timed_moves(teacher: MegatronTeacher) -> list[float]:
    """Return a list that gets the seconds of every copy to the GPU from now on.  There is no public name for one."""
    moves: list[float] = []
    offload = getattr(teacher, "_offload", None)
    if not isinstance(offload, HostOffload):
        return moves
    original = offload.load

    def load() -> None:
        moves.append(clocked(original)[1])

    offload.load = load  # type: ignore[method-assign]
    return moves


def _report_equal(
    report: Report, title: str, expected: dict[int, TeacherScores], found: dict[int, TeacherScores]
) -> None:  # fmt: skip
    names = ("logprob", "topk_ids", "topk_logprobs")
    wrong = [
        f"{name} of rollout {index}"
        for index, scores in expected.items()
        for name in names
        if not torch.equal(getattr(scores, name), getattr(found[index], name))
    ]
    report.same(
        f"{title}: scores with and without offloading", not wrong and found.keys() == expected.keys(),
        reason="; ".join(wrong[:3]),
    )  # fmt: skip
