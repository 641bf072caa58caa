"""Stop or skip an update that cannot be right, before it changes a weight, with the same decision on every rank.

Two kinds of updates cannot be right.  A loss or gradient norm that is NaN or infinite (--on-nonfinite).  Finite numbers
that no healthy run has (--on-spike): a teacher with one damaged weight gives log-probabilities of -1e33, and a learning
rate that is too high gives gradient norms of 1e13, and both train to the end without an error.

The limits are absolute numbers, far outside what healthy models give, and not multiples of a running median: a loss may
cross zero, and a rare token may raise the gradient norm of a healthy update to many times the usual, which is what
clipping is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_tropd.config import TrainingConfig

MAX_SKIPS_IN_A_ROW = 10
Verdict = Literal["stepped", "skipped"]


class BadUpdate(RuntimeError):
    """An update that the policy does not allow; it changed no weight."""

    exit_code = 17


class NonFiniteStep(BadUpdate):
    """The loss or the gradient norm of an update is NaN or infinite."""


class SpikeStep(BadUpdate):
    """A number of an update is finite but above its limit."""

    exit_code = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The numbers of one update, before it is made.  They are global, so all ranks decide alike."""

    step: int
    """Counted from 1."""
    loss: float
    """Nats per token."""
    grad_norm: float
    logprobs: Mapping[str, float] = field(default_factory=dict)
    """By model: mean log-probability [nats] of the response tokens; -inf if it excludes most of them."""
    reward: float = 0.0
    """Largest absolute reward of the rollout batch."""
    stepped_before: int = 0
    """Earlier updates of the same step that changed the weights."""


_SKIP = "or pass --on-spike skip (leave such updates out) or --on-spike warn (make them)"
_DAMAGED = (
    "the {who}'s weights are probably damaged: compare the files of --{who}-hf-checkpoint or --{who}-load with their "
    f"source; raise --spike-limit if they are not, {_SKIP}"
)
_CAUSES = {
    "reward": f"look at --reward-function; raise --spike-reward if such rewards are meant, {_SKIP}",
    "teacher": _DAMAGED.format(who="teacher"),
    "reference": _DAMAGED.format(who="reference"),
    "": "--lr is probably too high, or the student's weights are damaged: resume from a checkpoint before it with a "
    f"lower --lr, {_SKIP}",
}
"""What to do about a number above its limit, the most telling number first."""
_INPUTS = {"reward", "teacher", "reference"}
"""Numbers that do not come from the student: if one is absurd, it is the cause where the loss or gradient is NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Refusal:
    """Why an update may not be made."""

    bad: list[str]
    policy: str
    """``stop`` or ``skip``."""
    advice: str
    error: type[BadUpdate]


class Guard:
    """Decides whether an update may change the weights."""

    def __init__(self, settings: TrainingConfig, warn: Callable[[str], None]) -> None:
        self._settings, self._warn = settings, warn
        self._skipped = 0

    def refuses(self, update: Update) -> bool:
        """Return whether the update may not be made, be it skipped or the end of the run."""
        return self._refusal(update) is not None

    def judge(self, update: Update, rerun: str = "") -> Verdict:
        """Return ``stepped`` to make the update, ``skipped`` to leave it out.

        ``rerun`` says what a second computation of the update gave, for people; "" if there was none.

        Raises:
            NonFiniteStep: loss or gradient norm is not finite, and the policy is ``stop`` or MAX_SKIPS_IN_A_ROW
                skips came before.
            SpikeStep: the same for a number above its limit.
        """
        if refusal := self._refusal(update):
            return self._refuse(update, refusal, rerun)
        if spikes := self._spikes(update):
            self._warn(f"warning: step {update.step}: {' and '.join(spikes.values())}; {_advice(spikes)}")
        self._skipped = 0
        return "stepped"

    def _refusal(self, update: Update) -> _Refusal | None:
        spikes = self._spikes(update)
        numbers = {"loss": update.loss, "gradient norm": update.grad_norm}
        bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        alarm = bool(spikes) and self._settings.on_spike != "warn"
        if bad and not (alarm and spikes.keys() & _INPUTS):
            advice = "resume from the last checkpoint with a lower --lr or --clip-grad, or pass --on-nonfinite skip"
            return _Refusal(bad=bad, policy=self._settings.on_nonfinite, advice=advice, error=NonFiniteStep)
        if alarm:
            bad = [*spikes.values(), *bad]
            return _Refusal(bad=bad, policy=self._settings.on_spike, advice=_advice(spikes), error=SpikeStep)
        return None

    def _spikes(self, update: Update) -> dict[str, str]:
        """Return what is above its limit, by what it is a number of, and the sentence that says so."""
        nats, settings = self._settings.spike_limit, self._settings
        limits = {
            "reward": ("largest absolute reward", update.reward, settings.spike_reward, "--spike-reward"),
            "loss": ("loss", update.loss, nats, "--spike-limit"),
            "gradient": ("gradient norm", update.grad_norm, settings.spike_grad_norm, "--spike-grad-norm"),
        }
        for who, logprob in update.logprobs.items():
            limits[who] = (f"mean log-probability by the {who}", logprob, nats, "--spike-limit")
        return {
            kind: f"{name} is {value:.4g}, beyond {flag} {limit:g}"
            for kind, (name, value, limit, flag) in limits.items()
            if not abs(value) <= limit and (math.isfinite(value) or kind in _INPUTS)
        }

    def _refuse(self, update: Update, refusal: _Refusal, rerun: str) -> Verdict:
        self._skipped += 1
        advice = refusal.advice
        if refusal.policy == "skip" and self._skipped <= MAX_SKIPS_IN_A_ROW:
            return "skipped"
        if refusal.policy == "skip":
            advice = f"that was update {self._skipped} in a row; {advice}"
        moved = "no weight was changed by this step"
        if update.stepped_before:
            moved = (
                f"this update changed no weight, but the {update.stepped_before} before it in the same step did "
                "(--num-minibatches); no checkpoint holds them"
            )
        parts = [" and ".join(refusal.bad), *([rerun] if rerun else []), moved, advice]
        raise refusal.error(f"step {update.step}: {'; '.join(parts)}")


def _advice(spikes: Mapping[str, str]) -> str:
    return next(advice for kind, advice in _CAUSES.items() if kind in spikes or not kind)
