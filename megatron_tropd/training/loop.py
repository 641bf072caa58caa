"""The training loop: TrOPD as the paper tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron_tropd import rng
from megatron_tropd.config import TrainConfig
from megatron_tropd.data import guidance
from megatron_tropd.data.packing import count_regions, plan_packs
from megatron_tropd.data.prompts import PromptSource
from megatron_tropd.evaluation import Generate
from megatron_tropd.objectives.base import Objective
from megatron_tropd.reporting.progress import NullProgress
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.rollout.pool import EnginePool
from megatron_tropd.teacher.megatron import Destination, MegatronTeacher
from megatron_tropd.training.checkpointing import Checkpoints
from megatron_tropd.training.evaluations import Evaluations
from megatron_tropd.training.guard import Guard
from megatron_tropd.training.journal import Journal
from megatron_tropd.training.step import forward_backward
from megatron_tropd.training.student import Student
from megatron_tropd.types import Rollout, StepContext, StepReport
from megatron_tropd.weights.export import HfExporter
from megatron_tropd.weights.load import local_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The parts of a run, as ``assemble.py`` puts them together."""

    config: TrainConfig
    source: PromptSource
    student: Student
    teacher: MegatronTeacher
    objective: Objective
    engines: EnginePool
    exporter: HfExporter
    checkpoints: Checkpoints
    guard: Guard
    evaluations: Evaluations
    journal: Journal
    progress: NullProgress


def train(run: Run, start_step: int) -> None:
    """Train from ``start_step`` updates to --train-iters; collective over the world."""
    push_weights(run)
    if start_step == 0:
        run.evaluations.whole(_generate(run), step=0)
    for step in range(start_step, run.config.training.train_iters):
        report, rollouts = train_step(run, step)
        run.journal.step(report, rollouts)
        run.evaluations.part_if_due(_generate(run), step=report.step)  # before the save: a point saved is kept
        with run.progress.phase("save"):
            run.checkpoints.save_if_due(report.step, run.student, run.source)
    run.evaluations.whole(_generate(run), step=run.config.training.train_iters)


def _generate(run: Run) -> Generate:
    """The engines as evaluation sees them: with the student's present weights."""
    return partial(run.engines.generate, version=run.student.version)


def train_step(run: Run, step: int) -> tuple[StepReport, list[Rollout]]:
    """One update from one batch of rollouts."""
    config, student, progress = run.config, run.student, run.progress
    with progress.phase("generate"):
        requests = guidance.attach(
            run.source.take(config.rollout.rollout_batch_size),
            step,
            config.guidance,
            seed=config.training.seed,
            n_samples_per_prompt=config.rollout.n_samples_per_prompt,
            max_response_length=config.data.max_response_length,
        )
        sampling = SamplingParams(seed=config.training.seed, stream=rng.Stream.SAMPLING, step=step)
        rollouts = run.engines.generate(requests, sampling, student.version)
    plan = plan_packs(
        [len(rollout.token_ids) for rollout in rollouts],
        data_parallel_size=student.groups.layout.dp,
        max_tokens=config.training.max_tokens_per_microbatch,
        multiple_of=student.groups.layout.tp,  # sequence parallelism cuts the packed tokens over TP
        prompt_uids=[rollout.prompt_uid for rollout in rollouts],
    )
    with progress.phase("score"):
        destination = Destination(groups=student.groups, plan=plan)
        scores = run.teacher.score(rollouts, run.objective.needs.score, destination)
    with progress.phase("train"):
        context = StepContext(step=step, num_steps=config.training.train_iters)
        result = forward_backward(
            student, run.objective, rollouts, scores, plan, seed=config.training.seed, context=context
        )
        grad_norm, learning_rate = student.grad_norm(), student.learning_rate
        verdict = run.guard.judge(step=step + 1, loss=result.loss, grad_norm=grad_norm)
        if verdict == "stepped":
            student.step()
        else:
            student.skip()
    if verdict == "stepped":
        push_weights(run)
    return StepReport(
        step=step + 1,
        weight_version=student.version,
        loss=result.loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        tokens=count_regions(rollouts),
        metrics={**result.metrics, **_batch_metrics(run, step, rollouts)},
        seconds=progress.take_seconds(),
        verdict=verdict,
    ), rollouts


def push_weights(run: Run) -> None:
    """Give the engines the student's weights, in HF coordinates."""
    with run.progress.phase("push"):
        tensors = run.exporter.export(local_parameters(run.student.model), run.student.groups.world)
        run.engines.push(tensors, run.student.version)


def _batch_metrics(run: Run, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the rollouts themselves say."""
    count = len(rollouts)
    tokens = count_regions(rollouts)
    settings = run.config.guidance
    annealed = guidance.alpha(settings.schedule, step, settings.steps) if settings.mode != "none" else 0.0
    return {
        "guidance/alpha": annealed,
        "guidance/frac": tokens["guidance"] / max(sum(tokens.values()), 1),
        "guidance/len_mean": sum(r.guidance_len for r in rollouts) / count,
        "rollout/len_mean": sum(r.response_len for r in rollouts) / count,
        "rollout/truncated_frac": sum(r.finish == "length" for r in rollouts) / count,
    }
