"""The product's calls of one step with given rollouts: build, score, train.  The only place that knows their order.

They are those of ``setup/models.py``, ``training/batch.py`` and ``training/loop.py``, without files, engines and logs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_tropd.config import ModelConfig, ParallelConfig, TrainConfig, TrainingConfig
from megatron_tropd.data.packing import BatchPlan, plan_batch
from megatron_tropd.data.streams import SampleScores
from megatron_tropd.models.architecture import Architecture
from megatron_tropd.models.build import build_gpt_model
from megatron_tropd.objectives.base import Objective
from megatron_tropd.objectives.methods import make_objective
from megatron_tropd.objectives.settings import ObjectiveSettings
from megatron_tropd.parallel.groups import ModelGroups
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.teacher.scorer import Destination
from megatron_tropd.training.step import Batch, PackedUpdate, StepSums, forward_backward, pack_batch
from megatron_tropd.training.student import Student, build_student, params_dtype
from megatron_tropd.types import Rollout, StepContext, TeacherScores
from megatron_tropd.weights.coordinates.parameters import local_parameters

from .weights import fill_megatron

SEED, STEPS = 7, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The rollouts of a step, and how much of them is one micro-batch."""

    sequences: int
    prompt: int
    response: int
    max_tokens: int
    chunk: int
    top_k: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.response


DISTRIBUTED_OPTIMIZER = ParallelConfig(use_distributed_optimizer=True)


def config_of(work: Work, *, bf16: bool, parallel: ParallelConfig = DISTRIBUTED_OPTIMIZER) -> TrainConfig:
    """Return the flags of a run with full recomputation."""
    return TrainConfig(
        model=ModelConfig(bf16=bf16, recompute_granularity="full"),
        parallel=parallel,
        training=TrainingConfig(
            train_iters=STEPS, max_tokens_per_microbatch=work.max_tokens, logits_chunk_tokens=work.chunk, seed=SEED
        ),
    )


def objective_of(work: Work) -> Objective:
    """Return TrOPD."""
    return make_objective("tropd", ObjectiveSettings(top_k=work.top_k))


def make_student(arch: Architecture, groups: ModelGroups, config: TrainConfig, rank: int, *, version: int) -> Student:
    """Return a student with the random checkpoint ``version``."""
    model = build_student(config, arch, groups)
    fill_megatron(local_parameters(model), arch, groups.layout, rank, version=version)
    return Student(model, groups, config, vocab_size=arch.vocab_size)


def make_teacher(
    arch: Architecture, groups: ModelGroups, config: TrainConfig, rank: int, *, version: int, offload: bool = False
) -> MegatronTeacher:
    """Return a teacher with the random checkpoint ``version``."""
    model = build_gpt_model(arch, groups, params_dtype=params_dtype(config))
    fill_megatron(local_parameters(model), arch, groups.layout, rank, version=version)
    return MegatronTeacher(
        model, groups, vocab_size=arch.vocab_size, max_tokens_per_microbatch=config.training.max_tokens_per_microbatch,
        logits_chunk_tokens=config.training.logits_chunk_tokens, offload=offload,
    )  # fmt: skip


def given_rollouts(work: Work, vocab_size: int, *, seed: int = 11) -> list[Rollout]:
    """Return rollouts of random tokens, each of a prompt of its own, with the log-probabilities of a student that is
    not sure."""
    draw = random.Random(seed)
    return [
        Rollout(
            prompt_uid=index,
            sample_index=0,
            token_ids=tuple(draw.choices(range(vocab_size), k=work.length)),
            prompt_len=work.prompt,
            guidance_len=0,
            logprobs=tuple(-draw.uniform(0.0, 4.0) for _ in range(work.response)),
            weight_version=(0, 0),
            finish="length",
        )
        for index in range(work.sequences)
    ]


def plan_of(rollouts: Sequence[Rollout], config: TrainConfig, groups: ModelGroups) -> BatchPlan:
    """Return the plan of one update."""
    return plan_batch(
        rollouts, num_minibatches=1, data_parallel_size=groups.layout.dp,
        max_tokens=config.training.max_tokens_per_microbatch, multiple_of=groups.layout.tp,
    )  # fmt: skip


def score(
    teacher: MegatronTeacher, student: Student, objective: Objective, rollouts: Sequence[Rollout], plan: BatchPlan
) -> dict[int, TeacherScores]:
    """Return the teacher's scores of all rollouts."""
    return teacher.score(
        dict(enumerate(rollouts)), objective.needs.score, Destination(groups=student.groups, owners=plan.owners)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A scored batch with the micro-batches of its one update."""

    batch: Batch
    update: PackedUpdate


def batch_of(
    student: Student, teacher: MegatronTeacher, objective: Objective, rollouts: Sequence[Rollout],
    scores: dict[int, TeacherScores], plan: BatchPlan,
) -> Ready:  # fmt: skip
    """Return the batch to train on, packed and checked as the training loop does it."""
    batch = Batch(
        rollouts=rollouts, sample_scores={index: SampleScores(teacher=found) for index, found in scores.items()},
        context=StepContext(step=0, num_steps=STEPS), seed=SEED, teacher_hidden=teacher.hidden_like,
    )  # fmt: skip
    (update,) = pack_batch(student, objective, batch, plan)
    return Ready(batch=batch, update=update)


def train_pass(student: Student, objective: Objective, ready: Ready) -> StepSums:
    """Compute the gradient of the one update."""
    return forward_backward(student, objective, ready.batch, ready.update).sums


def gradients(student: Student) -> list[torch.Tensor]:
    """Return the finished gradient of every parameter, in fp32, valid until the next pass."""
    kept = [getattr(parameter, "main_grad", None) for parameter in student.model.parameters()]
    return [gradient for gradient in kept if gradient is not None]
