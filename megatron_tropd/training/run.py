"""The parts of a run, which ``setup/assemble.py`` builds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_tropd.config import TrainConfig
from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.objectives.base import Objective
from megatron_tropd.reporting.progress.progress import NullProgress
from megatron_tropd.rollout.engine_pool import EnginePool, Export
from megatron_tropd.training.checkpointing import Checkpoints
from megatron_tropd.training.evaluations import Evaluations
from megatron_tropd.training.guard import Guard
from megatron_tropd.training.parity import ParityAlarm, Probes
from megatron_tropd.training.rewarding import Rewarder
from megatron_tropd.training.run_logger import RunLogger
from megatron_tropd.training.stopping import Stopping
from megatron_tropd.training.stream import Scoring, Stream
from megatron_tropd.training.student import Student


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything a training step uses.  Parts that the objective does not need are None and were never built."""

    config: TrainConfig
    source: PromptSource
    student: Student
    stream: Stream
    teacher: Scoring | None
    teacher_weight: Tensor | None
    """Rows of the teacher's output table for this rank's shard of the student's vocabulary.  None before the
    student's last stage, and where no full distributions are compared."""
    reference: Scoring | None
    rewarder: Rewarder | None
    objective: Objective
    engines: EnginePool | None
    """None for supervised finetuning without --eval-data, which generates nothing."""
    export: Export
    checkpoints: Checkpoints
    stopping: Stopping
    guard: Guard
    parity: ParityAlarm
    probes: Probes
    evaluations: Evaluations
    logger: RunLogger
    progress: NullProgress
