"""The training loop: generate rollouts, score them, update the student, push the weights to the engines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NoReturn

from torch import Tensor

from megatron_tropd.checkpoints.elsewhere import SavedElsewhere
from megatron_tropd.checkpoints.metadata import CheckpointError
from megatron_tropd.data import guidance
from megatron_tropd.data.packing import BatchPlan, count_regions
from megatron_tropd.reports import StepReport, TokenNumbers
from megatron_tropd.teacher.scorer import ScorerError
from megatron_tropd.training.batch import plan_updates, score_batch
from megatron_tropd.training.diagnostics import diagnostics_due, gradient_diagnostics
from megatron_tropd.training.guard import BadUpdate
from megatron_tropd.training.parity import ParityError, probe_differences
from megatron_tropd.training.rerun import Computed, compute, compute_twice_if_bad
from megatron_tropd.training.run import Run
from megatron_tropd.training.step import Batch, PackedUpdate, StepSums, pack_batch
from megatron_tropd.training.stopping import Stopped
from megatron_tropd.training.stream import Pending
from megatron_tropd.training.student import Student
from megatron_tropd.training.token_numbers import send_to_rank_zero
from megatron_tropd.types import Counts, Rollout

PARITY = "parity/logprob_abs_diff_mean"
MISSING_TOPK = "teacher/topk_missing_frac"


def train(run: Run, start_step: int) -> None:
    """Train from ``start_step`` rollout batches to --train-iters; collective over the world."""
    last_step = run.config.training.train_iters
    push_weights(run)
    if (start_step == 0 or run.evaluations.due(start_step)) and not run.logger.has_evaluation(start_step):
        _evaluate(run, start_step, whole=start_step == 0)  # an earlier launch did not come to it
        if why := run.stopping.why():
            _end_step(run, start_step, why)
    for step in range(start_step, last_step):
        report, trained = train_step(run, step)
        run.logger.step(report, trained.rollouts, trained.tokens)
        why = run.stopping.why(report.step if report.step < last_step else None)
        if why is None:
            _evaluate(run, report.step)  # before the save: a resumed run evaluates its start only if this is left out
            why = run.stopping.why()
        _end_step(run, report.step, why)
    finish_save(run, last_step)
    if not run.logger.has_evaluation(last_step):
        _evaluate(run, last_step, whole=True)
    if why := run.stopping.why():
        _stop(run, why, "all steps")


def _end_step(run: Run, step: int, why: str | None) -> None:
    """Save after ``step`` if a save is due or if ``why`` asks for a stop.

    Raises:
        Stopped: on every rank, if a stop is asked for.
    """
    save_if_due(run, step, now=why is not None)
    if why is not None:
        _stop(run, why, f"the state after step {step}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRollouts:
    """The rollouts of a step, and what the loss read of those that are shown."""

    rollouts: Sequence[Rollout]
    tokens: Mapping[int, TokenNumbers]
    """By index, on rank 0; {} on other ranks and in a step of which no rollout is shown."""


def train_step(run: Run, step: int) -> tuple[StepReport, TrainedRollouts]:
    """Collect and score one batch of rollouts and make its updates; return the report and the rollouts."""
    progress = run.progress
    progress.begin_step(step + 1)
    ahead = run.config.rollout.rollout_lag > 0
    with progress.phase("generate", lambda: run.engines.written if run.engines else None):
        if run.objective.needs.rollouts and not ahead:
            run.student.sleep()
        rollouts = run.stream.take(step, run.student.version)
    _stop_before_update(run, step)
    arrived = {}
    if ahead:
        arrived = _begin_next(run, step)
    elif run.engines is not None:
        run.engines.sleep()
    version = run.student.version
    plan = plan_updates(run, rollouts)
    with _keeping_rollouts(run, step), _forgetting_bad_numbers(run), progress.phase("score"):
        scored = score_batch(run, rollouts, plan, step)
        updates = pack_batch(run.student, run.objective, scored.batch, plan)
    _stop_before_update(run, step)
    with progress.phase("train"):
        run.student.wake()
        gradients = _diagnostics(run, scored.batch, plan, step)
    with _forgetting_bad_numbers(run), progress.phase("train", _microbatches_done(run.student, updates)):
        outcome = _update(run, scored.batch, updates, step, scored.metrics.get("reward/abs_max", 0.0))
    del updates  # as large as the scores
    tokens = send_to_rank_zero(outcome.tokens) if scored.batch.shown else {}
    run.stream.trained()
    if run.objective.needs.rollouts and not ahead:
        arrived = push_weights(run)
    return StepReport(
        step=step + 1,
        weight_version=run.student.version,
        loss=outcome.sums.loss,
        grad_norm=outcome.grad_norm,
        learning_rate=outcome.learning_rate,
        tokens=count_regions(rollouts),
        metrics={
            **outcome.sums.metrics,
            **outcome.reruns,
            **scored.metrics,
            **gradients,
            **arrived,
            **_teacher_metrics(run),
            **_batch_metrics(run, step, rollouts, version),
        },
        seconds=progress.take_seconds(),
        verdict=outcome.verdict,
    ), TrainedRollouts(rollouts=rollouts, tokens=tokens)


@contextmanager
def _keeping_rollouts(run: Run, step: int) -> Iterator[None]:
    """Where scoring of batch ``step`` fails for good, save its rollouts with the state before the step.  Collective.

    Raises:
        ScorerError: on every rank; it says what failed and how to go on.
    """
    try:
        yield
    except ScorerError as error:
        try:
            _save_before_update(run, step)
        except SavedElsewhere as saved:
            raise ScorerError(f"{error}\n{saved}") from error
        except CheckpointError as not_saved:
            raise ScorerError(f"{error}\nThe rollouts of step {step + 1} are lost: {not_saved}") from error
        raise ScorerError(
            f"{error}\nThe rollouts of step {step + 1} are saved, with the state before the step: the same command "
            "scores them and goes on from there"
        ) from error


@contextmanager
def _forgetting_bad_numbers(run: Run) -> Iterator[None]:
    """Where a batch is refused for its numbers, keep none of them for the next launch, which would fail of them again:
    scores, also where they are no numbers at all, and rollouts that an update or the parity check refuses."""
    try:
        yield
    except (ValueError, BadUpdate, ParityError) as error:  # on every rank
        run.stream.distrust(rollouts=not isinstance(error, ValueError))
        raise


def _save_before_update(run: Run, step: int) -> None:
    """Save the state before the update of batch ``step``, with the rollouts of the batch.  Collective."""
    run.stream.take_prompts_back()
    run.student.wake()
    with run.progress.phase("save"):
        run.checkpoints.save(step, run.student, run.source, run.stream.pending, wait=True)


def _stop_before_update(run: Run, step: int) -> None:
    """Where a stop is asked for between two phases of a step, save before its update; the rollouts are not lost.

    Raises:
        Stopped: on every rank.
    """
    if run.engines is None or not run.objective.needs.rollouts:  # the responses are those of the data
        return
    if why := run.stopping.why():
        _save_before_update(run, step)
        _stop(run, why, f"the rollouts of step {step + 1}, with the state before it,")


def _stop(run: Run, why: str, what: str) -> NoReturn:
    run.stopping.obeyed(why)
    plural = "is" if what.startswith("the state") else "are"
    raise Stopped(
        f"Stopped by {why}: {what} {plural} saved in {run.config.save_dir}.  Run the same command again: it goes on "
        "from there."
    )


def _begin_next(run: Run, step: int) -> dict[str, float]:
    """Have the engines write the next batch with the weights that this one is about to change; see push_weights."""
    if step + 1 >= run.config.training.train_iters or not run.objective.needs.rollouts:
        return {}
    arrived = push_weights(run)
    with run.progress.phase("generate"):
        run.stream.begin(step + 1, run.student.version)
    return arrived


def _microbatches_done(student: Student, updates: Sequence[PackedUpdate]) -> Callable[[], Counts]:
    """Return what counts, from now on, the micro-batches of ``updates`` whose forward pass has begun on this rank."""
    before, total = student.microbatches, sum(len(update.microbatches) for update in updates)
    return lambda: Counts(done=student.microbatches - before, total=total, unit="micro-batches")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """The result of all updates of one rollout batch."""

    sums: StepSums
    grad_norm: float
    """Mean over the updates."""
    tokens: dict[int, Tensor]
    """``PassResult.tokens`` of all updates."""
    learning_rate: float
    """Of the last update."""
    verdict: Literal["stepped", "skipped"]
    """``skipped`` if at least one update was skipped."""
    reruns: Mapping[str, float]
    """By metric, how many updates were computed twice; {} where none was."""


def _update(run: Run, batch: Batch, updates: Sequence[PackedUpdate], step: int, largest_reward: float) -> _Outcome:
    """Make the optimizer updates of one rollout batch; the outcome is the same on every rank."""
    student = run.student
    made: list[Computed] = []
    verdict: Literal["stepped", "skipped"] = "stepped"
    first_version = student.version
    for packed in updates:
        once = partial(
            compute, run, batch, packed, largest_reward=largest_reward, stepped_before=student.version - first_version
        )
        made.append(compute_twice_if_bad(run, once))
        metrics = made[-1].found.sums.metrics
        learning_rate = student.learning_rate
        if run.guard.judge(made[-1].update, made[-1].rerun) == "stepped":
            if PARITY in metrics and first_version == min(r.weight_version[0] for r in batch.rollouts):
                _judge_parity(run, metrics[PARITY], f"rollouts of step {step + 1}")
            _judge_topk(run, metrics.get(MISSING_TOPK, 0.0), step)
            student.step()
        else:
            student.skip()
            verdict = "skipped"
    student.gather_weights()
    return _Outcome(
        sums=StepSums.of([one.found.sums for one in made]),
        grad_norm=sum(one.update.grad_norm for one in made) / len(made),
        tokens={index: table for one in made for index, table in one.found.tokens.items()},
        learning_rate=learning_rate, verdict=verdict, reruns=Counter(one.metric for one in made if one.metric),
    )  # fmt: skip


def _diagnostics(run: Run, batch: Batch, plan: BatchPlan, step: int) -> dict[str, float]:
    """Return the gradient diagnostics of the first update, before it is made; {} when ``step`` is not measured."""
    if not diagnostics_due(run.config, step):
        return {}
    return gradient_diagnostics(run.student, run.objective, batch, plan.minibatches[0])


def save_if_due(run: Run, step: int, *, now: bool = False) -> None:
    """Save a checkpoint if it is due after ``step`` or wanted ``now``, with the batch that was begun before the step's
    update; and make visible what --async-save has written."""
    finish_save(run, step, wait=False)
    if not (now or run.checkpoints.due(step)):
        return
    with run.progress.phase("generate"):
        run.stream.settle(run.student.version)
    with run.progress.phase("save"):
        run.checkpoints.save(step, run.student, run.source, run.stream.pending, wait=now)


def finish_save(run: Run, step: int, *, wait: bool = True) -> None:
    """Make the checkpoint visible that --async-save is writing; without ``wait`` only if it is written.  If it could
    not be written, the state after ``step``, which is the newest, is what an emergency save holds."""
    if not run.checkpoints.in_writing:
        return

    def pending() -> Pending | None:
        run.stream.settle(run.student.version)
        return run.stream.pending

    with run.progress.phase("save"), run.checkpoints.or_elsewhere(step, run.student, run.source, pending):
        run.checkpoints.finish(wait=wait)


def push_weights(run: Run) -> dict[str, float]:
    """Push the student's weights to the engines unless they have this version, and check the push with the probes.

    The engines score the probes with the new weights, and their log-probabilities are compared with the trainer's.
    Collective; returns the metric of the comparison, or {} where there is none.
    """
    engines, student = run.engines, run.student
    if engines is None or engines.weight_version == student.version:
        return {}
    with run.progress.phase("push"):
        engines.wake()
        report = engines.push(run.export, student.version)
        if not report.probe_logprobs:
            return {}
        max_tokens = run.config.training.max_tokens_per_microbatch
        gaps = probe_differences(student, run.probes, report.probe_logprobs, max_tokens=max_tokens)
    for name, gap in gaps.items():
        _judge_parity(run, gap, f"weight version {student.version}, {name}")
    return {"parity/probe_abs_diff_mean": max(gaps.values())}


def _judge_parity(run: Run, gap: float, what: str) -> None:
    if warning := run.parity.judge(gap, what):
        run.progress.message(f"warning: {warning}")


def _judge_topk(run: Run, missing: float, step: int) -> None:
    if warning := run.parity.judge_missing_topk(missing, f"step {step + 1}"):
        run.progress.message(f"warning: {warning}")


def _evaluate(run: Run, step: int, *, whole: bool = False) -> None:
    """Evaluate on all held-out prompts (``whole``), or on --eval-prompts of them if that is due after ``step``."""
    engines = run.engines
    if engines is None or not (whole or run.evaluations.due(step)):
        return
    with run.progress.phase("generate"):
        run.stream.settle(run.student.version)  # weights can be pushed only when nothing is in writing
    push_weights(run)
    generate = partial(engines.generate, version=run.student.version)
    run.student.sleep()
    run.evaluations.run(generate, step=step, whole=whole, counts=lambda: engines.written)
    run.student.wake()


def _teacher_metrics(run: Run) -> dict[str, float]:
    """Return what the teacher's scorer measured of the step."""
    if run.teacher is None:
        return {}
    return {f"teacher/{name}": value for name, value in run.teacher.scorer.metrics().items()}


def _batch_metrics(run: Run, step: int, rollouts: Sequence[Rollout], version: int) -> dict[str, float]:
    """Return the metrics of the rollouts themselves: lengths, guidance, truncation, engine counters.  The responses of
    the data, in supervised finetuning, are no rollouts."""
    if run.engines is None or not run.objective.needs.rollouts:
        return {}
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
        "rollout/lag_mean": sum(version - r.weight_version[0] for r in rollouts) / count,
        "engine/idle_frac": run.engines.idle_share(),
        **{f"engine/{name}": float(count) for name, count in run.engines.counts.items()},
    }
