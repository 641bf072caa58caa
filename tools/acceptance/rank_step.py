"""One step of a small student and teacher on this rank of a tensor-parallel job; what section g compares."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_tropd.config import ParallelConfig
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel.groups import student_groups, teacher_groups
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.training.student import Student
from megatron_tropd.weights.coordinates.megatron_boxes import rank_boxes
from megatron_tropd.weights.coordinates.parameters import local_parameters

from .rank_worker import Numbers, Piece
from .shapes import SHALLOW, TINY
from .step_calls import (
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

REAL = Work(sequences=6, prompt=32, response=224, max_tokens=768, chunk=256, top_k=64)
TINY_WORK = Work(sequences=4, prompt=5, response=19, max_tokens=48, chunk=16, top_k=8)


def numbers(tp: int, sequence_parallel: bool, tiny: bool) -> Numbers:
    """Return the numbers of a step in fp32; collective over the world."""
    arch, work = (TINY, TINY_WORK) if tiny else (SHALLOW, REAL)
    layout, rank = ParallelLayout(tp=tp), dist.get_rank()
    # Without the distributed optimizer: its reduce-scatter is not among gloo's operations on CUDA tensors.
    parallel = ParallelConfig(tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    config, groups = config_of(work, bf16=False, parallel=parallel), student_groups(layout)
    student, objective = make_student(arch, groups, config, rank, version=0), objective_of(work)
    teacher = make_teacher(arch, teacher_groups(layout), config, rank, version=1)
    rollouts = given_rollouts(work, arch.vocab_size)
    plan = plan_of(rollouts, config, groups)
    scores = score(teacher, student, objective, rollouts, plan)
    sums = train_pass(student, objective, batch_of(student, teacher, objective, rollouts, scores, plan))
    found = Numbers(
        loss=sums.loss, grad_norm=student.grad_norm(),
        teacher_logprobs=torch.cat([scores[index].logprob for index in sorted(scores)]).numpy(),
        pieces=_pieces(student, arch, rank),
    )  # fmt: skip
    student.close()
    return found


def _pieces(student: Student, arch: Architecture, rank: int) -> tuple[Piece, ...]:
    params = local_parameters(student.model)
    pieces = []
    for wanted in rank_boxes(arch, student.groups.layout, rank):
        parameter = next(params[name] for name in wanted.names if name in params)
        for box in wanted.boxes:
            values = parameter.main_grad[box.local_slices].cpu()  # type: ignore[attr-defined]  # Megatron's
            pieces.append(Piece(name=box.hf_name, place=box.hf_slices, values=values.numpy().copy()))
    return tuple(pieces)
