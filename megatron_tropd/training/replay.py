"""Compute a step again from what was saved, without changing the run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.training.batch import plan_updates, score_batch
from megatron_tropd.training.guard import Update
from megatron_tropd.training.loop import push_weights
from megatron_tropd.training.rerun import compute
from megatron_tropd.training.run import Run
from megatron_tropd.training.step import StepSums, pack_batch
from megatron_tropd.training.weights_digest import gradient_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The numbers of a step, as its line of metrics.jsonl has them, and those of its updates."""

    loss: float
    """Nats per token."""
    grad_norm: float
    """Mean over the updates."""
    updates: tuple[Update, ...]
    digests: tuple[str, ...]
    """Of each update's gradient."""
    from_checkpoint: bool
    """Whether the checkpoint had the rollouts; otherwise they are the engine's, or of the data."""


def replay_step(run: Run, step: int) -> Replay:
    """Make step ``step`` (from 0) of a run whose state is that before it.  Collective over the world.

    As in the run, an update that the guard refuses is left out before the next one of the step; nothing ends here.
    """
    student, from_checkpoint = run.student, run.stream.pending is not None
    if run.objective.needs.rollouts and not from_checkpoint:
        push_weights(run)
    rollouts = run.stream.take(step, student.version)
    plan = plan_updates(run, rollouts)
    scored = score_batch(run, rollouts, plan, step)
    sums, updates, digests, first_version = [], [], [], student.version
    for packed in pack_batch(student, run.objective, scored.batch, plan):
        computed = compute(
            run, scored.batch, packed, largest_reward=scored.metrics.get("reward/abs_max", 0.0),
            stepped_before=student.version - first_version,
        )  # fmt: skip
        digests.append(gradient_digest(student))
        sums.append(computed.found.sums)
        updates.append(computed.update)
        if run.guard.refuses(computed.update):
            student.skip()
        else:
            student.step()
    student.gather_weights()
    return Replay(
        loss=StepSums.of(sums).loss,
        grad_norm=sum(update.grad_norm for update in updates) / len(updates),
        updates=tuple(updates), digests=tuple(digests), from_checkpoint=from_checkpoint,
    )  # fmt: skip
