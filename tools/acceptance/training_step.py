"""Section d: one whole TrOPD step at real sizes: seconds, memory, and the share of the GPU's peak that it reaches.

Repeating and resuming it is in repeat.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from megatron_tropd.data.packing import BatchPlan
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.objectives.base import Objective
from megatron_tropd.parallel.groups import ModelGroups, teacher_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.training.student import Student
from megatron_tropd.types import Rollout

from . import repeat
from .device import GB, clocked, one_rank, peak_gb, product_of
from .flops import forward_flops, num_parameters, peak_of
from .host_waits import host_waits
from .report import Report, free_memory
from .setting import Setting
from .shapes import QWEN3_0_6B, QWEN3_1_7B, QWEN3_4B, QWEN3_8B, TINY, TINY_TEACHER
from .step_calls import (
    Ready,
    Work,
    batch_of,
    config_of,
    given_rollouts,
    make_student,
    make_teacher,
    objective_of,
    plan_of,
    score,
    train_pass,
)

T = TypeVar("T")
REAL = Work(sequences=8, prompt=96, response=8096, max_tokens=16384, chunk=8192, top_k=64)
TINY_WORK = Work(sequences=4, prompt=5, response=19, max_tokens=48, chunk=16, top_k=8)
TRAIN_MFU, SCORE_MFU = 0.40, 0.50
REPEATS = 2
_STUDENT_BYTES, _TEACHER_BYTES = 18, 2
"""Per parameter in bf16: weight, fp32 gradient, fp32 master and two moments; weight."""
_WORKING_GB = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What is trained and what scores, in words and in numbers."""

    names: str
    student: Architecture
    teacher: Architecture

    @property
    def counted_gb(self) -> float:
        """GB of weights, gradients and optimizer states, by counting."""
        return (_STUDENT_BYTES * num_parameters(self.student) + _TEACHER_BYTES * num_parameters(self.teacher)) / GB


PAIRS = (
    Models(names="student 1.7B, teacher 8B", student=QWEN3_1_7B, teacher=QWEN3_8B),
    Models(names="student 1.7B, teacher 4B", student=QWEN3_1_7B, teacher=QWEN3_4B),
    Models(names="student 0.6B, teacher 1.7B", student=QWEN3_0_6B, teacher=QWEN3_1_7B),
)


def choose(setting: Setting) -> Models:
    """Return the first pair whose weights and states fit the GPU with room to work, or else the last."""
    if setting.tiny:
        return Models(names="tiny models", student=TINY, teacher=TINY_TEACHER)
    total = torch.cuda.mem_get_info()[1] / GB
    return next((pair for pair in PAIRS if pair.counted_gb + _WORKING_GB < total), PAIRS[-1])


def run(report: Report, setting: Setting) -> None:
    """See the module."""
    groups = one_rank()
    with report.attempt("one step"):
        _step(report, setting, groups)
    free_memory()
    with report.attempt("repeat and resume"):
        repeat.run(report, setting, groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Everything that a step needs."""

    title: str
    models: Models
    work: Work
    student: Student
    teacher: MegatronTeacher
    objective: Objective
    rollouts: Sequence[Rollout]
    plan: BatchPlan
    peak: float
    """FLOP/s that count as all of the GPU."""

    def first(self) -> Scene:
        """Return the scene of the first micro-batch alone."""
        rollouts = self.rollouts[: max(1, self.work.max_tokens // self.work.length)]
        return replace(
            self, rollouts=rollouts, plan=plan_of(rollouts, config_of(self.work, bf16=True), self.student.groups)
        )


def _scene(report: Report, setting: Setting, groups: ModelGroups) -> Scene:
    models, work = choose(setting), TINY_WORK if setting.tiny else REAL
    config = config_of(work, bf16=setting.cuda)
    peak = _peak_flops(report, setting)
    student, built = clocked(lambda: make_student(models.student, groups, config, 0, version=0))
    report.measured(f"{models.names}: student built in", built, unit=" s")
    frozen = teacher_groups(ParallelLayout())
    teacher, built = clocked(lambda: make_teacher(models.teacher, frozen, config, 0, version=1))
    report.measured(f"{models.names}: teacher built in", built, unit=" s")
    rollouts = given_rollouts(work, models.student.vocab_size)
    return Scene(
        title=f"{models.names}, {work.sequences} x {work.length:,} tokens, micro-batches of {work.max_tokens:,}",
        models=models, work=work, student=student, teacher=teacher, objective=objective_of(work), rollouts=rollouts,
        plan=plan_of(rollouts, config, groups), peak=peak,
    )  # fmt: skip


def _peak_flops(report: Report, setting: Setting) -> float:
    size, dtype = (256, torch.float32) if setting.tiny or not setting.cuda else (8192, torch.bfloat16)
    reached = product_of(size, dtype)
    report.measured(f"a product of {size}^3 in {dtype}", reached / 1e12, unit=" TFLOP/s")
    known = peak_of(torch.cuda.get_device_name()) if setting.cuda else None
    if known is None:
        report.add(
            "peak FLOP/s", "measured", measured=f"{reached / 1e12:.1f} TFLOP/s", reason="that of the product above"
        )
        return reached
    report.add(
        "peak FLOP/s", "measured", measured=f"{known / 1e12:.0f} TFLOP/s", reason="dense bf16, by the GPU's name"
    )
    return known


def _step(report: Report, setting: Setting, groups: ModelGroups) -> None:
    scene = _scene(report, setting, groups)
    warm = scene.first()
    _train(warm, _score(warm))  # compiles kernels, makes optimizer states
    if setting.cuda:
        report.measured(
            f"{scene.models.names}: memory between steps", torch.cuda.memory_allocated() / GB, unit=" GB",
            reason=f"{scene.models.counted_gb:.2f} GB of weights, gradients and optimizer state by counting",
        )  # fmt: skip
    ready = _measure(report, setting, scene)
    _waits(report, setting, warm)
    with report.attempt("the same step twice"):
        repeat.twice(report, scene.title, scene.student, scene.objective, ready)
    scene.student.close()


def _score(scene: Scene) -> Ready:
    scores = score(scene.teacher, scene.student, scene.objective, scene.rollouts, scene.plan)
    return batch_of(scene.student, scene.teacher, scene.objective, scene.rollouts, scores, scene.plan)


def _train(scene: Scene, ready: Ready) -> None:
    train_pass(scene.student, scene.objective, ready)
    scene.student.grad_norm()
    scene.student.step()


def _best(work: Callable[[], T]) -> tuple[T, float, float | None]:
    """Return the result, the shortest seconds of a few, and the peak in GB."""
    found = [peak_gb(lambda: clocked(work)) for _ in range(REPEATS)]
    (result, _), peak = found[-1]
    return result, min(seconds for (_, seconds), _ in found), peak


def _measure(report: Report, setting: Setting, scene: Scene) -> Ready:
    """Measure scoring and training; returns the scored batch."""
    lengths, labels = [scene.work.length] * scene.work.sequences, scene.work.sequences * scene.work.response
    scores, seconds, peak = _best(
        lambda: score(scene.teacher, scene.student, scene.objective, scene.rollouts, scene.plan)
    )
    flops = forward_flops(scene.models.teacher, lengths, labels)
    _report_phase(report, setting, scene, "score", flops, seconds, peak, SCORE_MFU)
    ready, seconds = clocked(
        lambda: batch_of(scene.student, scene.teacher, scene.objective, scene.rollouts, scores, scene.plan)
    )
    report.measured(f"{scene.title}: packing and check of the batch", seconds, unit=" s")
    _, seconds, peak = _best(lambda: _train(scene, ready))
    flops = 3 * forward_flops(scene.models.student, lengths, labels)
    _report_phase(report, setting, scene, "train", flops, seconds, peak, TRAIN_MFU)
    sums, seconds = clocked(lambda: train_pass(scene.student, scene.objective, ready))
    report.measured(f"{scene.title}: train, without optimizer", seconds, unit=" s", reason=f"loss {sums.loss:.4f}")
    _, seconds = clocked(scene.student.grad_norm)
    report.measured(f"{scene.title}: gradient norm", seconds, unit=" s", form=".3f")
    _, seconds = clocked(scene.student.step)
    report.measured(f"{scene.title}: optimizer", seconds, unit=" s", form=".3f")
    return ready


def _report_phase(
    report: Report, setting: Setting, scene: Scene, phase: str, flops: float, seconds: float, peak: float | None,
    goal: float,
) -> None:  # fmt: skip
    tokens = scene.work.sequences * scene.work.length
    memory = "" if peak is None else f", {peak:.1f} GB at the peak"
    report.measured(f"{scene.title}: {phase}", seconds, unit=" s", reason=f"{tokens / seconds:,.0f} tokens/s{memory}")
    report.goal(
        f"{scene.title}: {phase}, model FLOPs / (seconds x peak FLOP/s)", flops / seconds / scene.peak, at_least=goal,
        applies=setting.real, form=".1%", reason=f"{flops / 1e12:,.1f} TFLOP; recomputation is not counted",
    )  # fmt: skip


def _waits(report: Report, setting: Setting, scene: Scene) -> None:
    """List where the host waits for the GPU, over one micro-batch."""
    scores = score(scene.teacher, scene.student, scene.objective, scene.rollouts, scene.plan)
    ready = batch_of(scene.student, scene.teacher, scene.objective, scene.rollouts, scores, scene.plan)
    phases: dict[str, Callable[[], object]] = {
        "score": lambda: score(scene.teacher, scene.student, scene.objective, scene.rollouts, scene.plan),
        "forward and backward": lambda: train_pass(scene.student, scene.objective, ready),
    }
    for phase, work in phases.items():
        if not setting.cuda:
            work()
            report.not_run(f"waits of the host in one micro-batch, {phase}", "a CPU has none")
            continue
        found = host_waits(work)
        places = [f"{number} x {place}" for place, number in found.most_common()]
        report.measured(
            f"waits of the host in one micro-batch, {phase}", found.total(), form=".0f", reason="; ".join(places[:12]),
            details=places,
        )  # fmt: skip
