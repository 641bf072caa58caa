"""Compute an update a second time where its numbers cannot be right, to tell a transient error from a persistent one.

The second pass has the same weights, rollouts, scores and packed micro-batches.  Nothing in it is random: there is no
dropout, and the gate's coins are in the micro-batches.  So on sound hardware it gives what the first one gave, up to
the order of sums on a GPU.  If its numbers are good, a bit flipped on the way (Megatron's TRANSIENT_ERROR).  If they
are bad again, the cause is in what both passes read, or in a device that errs every time.

The names are those of Megatron's ``rerun_state_machine``, but not the machine.  It keeps one per process, reduces its
flags on CUDA devices only, puts its own iterator around the data, and judges a result of one rank inside the loss,
where the gradient norm is not known.  Here both numbers are global before anything is decided, so all ranks come to the
same decision without a message.  What it does with a repeated result, to save and to start on another device so that
a PERSISTENT_ERROR of the hardware can be told from a CORRECT_RESULT, is left to ``tools/replay_step.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_tropd.training.guard import Update
from megatron_tropd.training.run import Run
from megatron_tropd.training.step import Batch, PackedUpdate, PassResult, forward_backward, mean_logprobs

TRANSIENT, PERSISTENT = "guard/transient_errors", "guard/persistent_errors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """An update whose gradient is in the student's buffers."""

    found: PassResult
    update: Update
    """Its numbers, for the guard."""
    rerun: str = ""
    """What a second computation gave that was bad too, for people; "" otherwise."""
    metric: str = ""
    """In which an update counts that was computed twice; "" for others."""


def compute(
    run: Run, batch: Batch, packed: PackedUpdate, *, largest_reward: float = 0.0, stepped_before: int = 0
) -> Computed:
    """Compute the gradient of an update and the numbers that it is judged by; collective over the world."""
    found = forward_backward(run.student, run.objective, batch, packed)  # sets all gradients to zero first
    update = Update(
        step=batch.context.step + 1, loss=found.sums.loss, grad_norm=run.student.grad_norm(),
        logprobs=mean_logprobs(found.sums.metrics), reward=largest_reward, stepped_before=stepped_before,
    )  # fmt: skip
    return Computed(found=found, update=update)


def compute_twice_if_bad(run: Run, once: Callable[[], Computed]) -> Computed:
    """Return what ``once`` computes; if the guard refuses that, what it computes the second time.

    With --no-rerun-on-nonfinite it is called once.  Collective over the world.
    """
    student, begun = run.student, run.student.microbatches
    first = once()
    if not run.config.training.rerun_on_nonfinite or not run.guard.refuses(first.update):
        return first
    student.microbatches = begun  # of which a heartbeat says how many of the update's are done
    second = once()
    if run.guard.refuses(second.update):
        rerun = _repeated(first.update, second.update)
        return Computed(found=second.found, update=second.update, rerun=rerun, metric=PERSISTENT)
    run.progress.message(_transient(first.update, second.update))
    return Computed(found=second.found, update=second.update, metric=TRANSIENT)


def _numbers(update: Update) -> str:
    means = "".join(f", log-probability by the {who} {mean:.6g}" for who, mean in update.logprobs.items())
    return f"loss {update.loss:.6g}, gradient norm {update.grad_norm:.6g}{means}"


def _transient(first: Update, second: Update) -> str:
    return (
        f"warning: step {first.step}: transient error: an update gave {_numbers(first)}, and computed again from the "
        f"same batch {_numbers(second)}; the run goes on with the second.  If this comes again, test the devices"
    )


def _repeated(first: Update, second: Update) -> str:
    if repr(first) == repr(second):  # in which NaN equals NaN
        return (
            "computed again from the same batch, the update gave the same numbers: a persistent error, of the batch, "
            "the weights, the settings or a device"
        )
    return f"computed again from the same batch, the update was bad too (the first time: {_numbers(first)})"
