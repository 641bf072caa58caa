"""The same step twice, and resumed from a checkpoint, bit for bit; part of section d."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.checkpoints.load import load_checkpoint
from megatron_tropd.checkpoints.save import save_checkpoint
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.objectives.base import Objective
from megatron_tropd.parallel.groups import ModelGroups, teacher_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.training.student import Student

from .device import GB, clocked
from .report import Report
from .setting import Setting
from .shapes import FEW_LAYERS, TINY
from .step_calls import (
    Ready,
    Work,
    batch_of,
    config_of,
    given_rollouts,
    gradients,
    make_student,
    make_teacher,
    objective_of,
    plan_of,
    score,
    train_pass,
)
from .weights import digest

SMALL = Work(sequences=4, prompt=96, response=2000, max_tokens=4192, chunk=4096, top_k=64)
TINY_WORK = Work(sequences=4, prompt=5, response=19, max_tokens=48, chunk=16, top_k=8)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Have torch use deterministic kernels only, without filling memory that will be written anyway."""
    settings: Any = torch.utils.deterministic
    before = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = before


def twice(report: Report, title: str, student: Student, objective: Objective, ready: Ready) -> bool:
    """Compute the same gradient twice; returns whether it was equal, bit for bit.

    The loss has to be.  The gradient is a goal: kernels of attention's backward may add in any order.
    """
    first = train_pass(student, objective, ready)
    kept = [gradient.clone() for gradient in gradients(student)]
    second = train_pass(student, objective, ready)
    report.same(
        f"{title}, the same step twice: loss", first.loss == second.loss, measured=f"{first.loss!r} and {second.loss!r}"
    )
    pairs = list(zip(kept, gradients(student), strict=True))
    equal = all(torch.equal(before, now) for before, now in pairs)
    apart = torch.stack([(before - now).double().norm() for before, now in pairs]).norm()
    size = torch.stack([before.double().norm() for before in kept]).norm()
    report.goal(
        f"{title}, the same step twice: difference of the gradients, relative", float(apart / size), at_most=0.0,
        form=".1e", reason=f"digest {digest(gradients(student))}",
    )  # fmt: skip
    return equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """A small student's step."""

    arch: Architecture
    make: Callable[[int], Student]
    """Returns a student with a random checkpoint, by its number."""
    objective: Objective
    ready: Ready

    def step(self, student: Student) -> tuple[float, str, str]:
        """Make an update; returns the loss, and the digests of the gradient and of the weights after it."""
        sums = train_pass(student, self.objective, self.ready)
        gradient = digest(gradients(student))
        student.grad_norm()
        student.step()
        return sums.loss, gradient, digest(student.model.parameters())


def run(report: Report, setting: Setting, groups: ModelGroups) -> None:
    """Repeat a small student's step, save it, resume it in another object, and compare the next step."""
    arch, work = (TINY, TINY_WORK) if setting.tiny else (FEW_LAYERS, SMALL)
    config = config_of(work, bf16=setting.cuda)

    def make(version: int) -> Student:
        return make_student(arch, groups, config, 0, version=version)

    student, objective = make(0), objective_of(work)
    teacher = make_teacher(arch, teacher_groups(ParallelLayout()), config, 0, version=1)
    rollouts = given_rollouts(work, arch.vocab_size)
    plan = plan_of(rollouts, config, groups)
    scores = score(teacher, student, objective, rollouts, plan)
    ready = batch_of(student, teacher, objective, rollouts, scores, plan)
    small = Small(arch=arch, make=make, objective=objective, ready=ready)
    title = f"student of {sum(p.numel() for p in student.model.parameters()) / 1e6:,.1f}M parameters"
    mode, exact = _repeatable(report, title, small, student)
    with mode():
        _resume(report, title, small, student, exact)


Mode = Callable[[], AbstractContextManager[None]]


def _repeatable(report: Report, title: str, small: Small, student: Student) -> tuple[Mode, bool]:
    """Return the mode of torch in which a step repeats itself bit for bit, and whether there is one."""
    modes: dict[str, Mode] = {"": nullcontext, ", under use_deterministic_algorithms": _deterministic}
    for name, mode in modes.items():
        try:
            with mode():
                if twice(report, title + name, student, small.objective, small.ready):
                    return mode, True
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            report.not_run(f"{title}{name}", str(error).splitlines()[0])
    return nullcontext, False


def _state(student: Student) -> Iterator[Tensor]:
    """Yield weights, master weights and moments."""
    yield from student.model.parameters()
    for part in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                state = part.optimizer.state[parameter]
                yield from (state[name] for name in sorted(state) if isinstance(state[name], Tensor))


def _resume(report: Report, title: str, small: Small, student: Student, exact: bool) -> None:
    small.step(student)
    folder = Path(tempfile.mkdtemp(prefix="tropd-acceptance-"))
    try:
        common = {"weight_version": student.version}
        _, saved = clocked(
            lambda: save_checkpoint(
                folder, 1, student.sharded_state_dict(), common, arch=small.arch, hf_sidecar=None,
                make_vocab_size_divisible_by=student.groups.layout.make_vocab_size_divisible_by,
            )
        )  # fmt: skip
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / GB
        report.measured(f"{title}: checkpoint saved in", saved, unit=" s", reason=f"{size:.2f} GB")
        held, rate = digest(_state(student)), student.learning_rate
        continued = small.step(student)
        student.close()
        fresh = small.make(5)
        _, loaded = clocked(lambda: _load(folder, fresh, small.arch))
        report.measured(f"{title}: checkpoint loaded in", loaded, unit=" s")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    same = digest(_state(fresh)) == held and fresh.learning_rate == rate and fresh.version == common["weight_version"]
    report.same(f"{title}, resumed: weights, master weights, moments, learning rate", same, measured=f"digest {held}")
    resumed = small.step(fresh)
    report.same(
        f"{title}, resumed: loss of the next step", resumed[0] == continued[0],
        measured=f"{continued[0]!r} and {resumed[0]!r}",
    )  # fmt: skip
    what = f"{title}, resumed: gradient of the next step, and the weights after it"
    if exact:
        report.same(what, resumed[1:] == continued[1:], measured=f"{continued[1:]} and {resumed[1:]}")
    else:
        report.not_run(what, "the step does not repeat itself bit for bit here")
    fresh.close()


def _load(folder: Path, student: Student, arch: Architecture) -> None:
    state, common = load_checkpoint(folder, None, student.sharded_state_dict(is_loading=True), arch=arch)
    student.load_state_dict(state, version=int(common["weight_version"]))
