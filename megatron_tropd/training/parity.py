"""Check that engines and trainer compute the same log-probabilities, and so use the same weights.

Versions and checksums show only that the bytes of a push arrived; equal log-probabilities show that both sides build
the same model from them.  Every step compares the tokens of its rollouts.  After every push, engines outside the
trainer's processes also score a few fixed sequences (probes) before they generate anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tropd.data.packing import plan_batch
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.training.old_policy import old_policy_scores
from megatron_tropd.training.student import Student
from megatron_tropd.types import Prompt, Rollout

NUM_PROBES = 2
PROBE_TOKENS = 64


MISSING_TOPK_LIMIT = 1e-3
"""Largest share of the written tokens that the gate rejects although the teacher sent no top-k for them: their loss
then lacks its forward KL."""


class ParityError(RuntimeError):
    """Engine and trainer disagree about the log-probabilities of the same tokens."""


class ParityAlarm:
    """Compares mean differences with --parity-limit.  They are global numbers, so all ranks decide alike."""

    def __init__(self, limit: float, policy: Literal["stop", "warn"]) -> None:
        self._limit, self._policy = limit, policy

    def judge(self, mean: float, what: str) -> str | None:
        """Return a warning if the mean difference ``mean`` [nats] is above the limit or NaN, else None.

        Raises:
            ParityError: instead of the warning, under ``stop``.
        """
        if mean <= self._limit:  # false for NaN, which is an alarm too
            return None
        text = (
            f"{what}: the engine's log-probabilities differ from the trainer's by {mean:.3g} nats on average, above "
            f"--parity-limit {self._limit:g}; the engine holds other weights, another dtype or another temperature"
        )
        return self._alarm(text)

    def judge_missing_topk(self, share: float, what: str) -> str | None:
        """As :meth:`judge`, of the share of the written tokens that need a top-k which the teacher did not send."""
        if share <= MISSING_TOPK_LIMIT:
            return None
        return self._alarm(
            f"{what}: {share:.3g} of the tokens are rejected by the gate and have no top-k, above "
            f"{MISSING_TOPK_LIMIT:g}: engine and trainer differ by more than --teacher-topk-margin; raise it, or set "
            "it to 0 to send every top-k"
        )

    def _alarm(self, text: str) -> str:
        if self._policy == "stop":
            raise ParityError(f"{text} (--on-parity warn trains on)")
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Probes:
    """Fixed sequences that engines and trainer score, to compare their log-probabilities."""

    sequences: tuple[Rollout, ...]
    vocab_size: int
    """Size of the student's vocabulary.  An engine's log-probabilities of given tokens are over all of it, including
    ids that the other models do not have."""


def probe_sequences(prompts: Sequence[Prompt], count: int = NUM_PROBES) -> tuple[Rollout, ...]:
    """Return the first ``count`` prompts, each with the teacher's response if it has one, cut to PROBE_TOKENS tokens.

    All tokens but the first count as written, so that all of them are scored.
    """
    probes = []
    for prompt in prompts:
        token_ids = (prompt.token_ids + (prompt.teacher_response_ids or ()))[:PROBE_TOKENS]
        if len(token_ids) >= 2:
            probes.append(
                Rollout(
                    prompt_uid=prompt.uid, sample_index=0, token_ids=token_ids, prompt_len=1, guidance_len=0,
                    logprobs=(0.0,) * (len(token_ids) - 1), weight_version=(0, 0), finish="length",
                )
            )  # fmt: skip
        if len(probes) == count:
            break
    return tuple(probes)


def probe_differences(
    student: Student, probes: Probes, scored: Mapping[str, Sequence[Sequence[float]]], *, max_tokens: int
) -> dict[str, float]:
    """Return the mean absolute difference [nats] of trainer and engine over the probes, by engine; equal on all ranks.

    Collective over the world.  ``scored`` holds the engines' log-probabilities (:class:`PushReport`).
    """
    layout = student.groups.layout
    plan = plan_batch(
        probes.sequences, num_minibatches=1, data_parallel_size=layout.dp, max_tokens=max_tokens,
        multiple_of=student.token_multiple, sequence_multiple_of=student.sequence_multiple,
        num_microbatches_multiple_of=student.microbatch_multiple,
    )  # fmt: skip
    scored_here = old_policy_scores(student, probes.sequences, plan, vocab_size=probes.vocab_size)
    mine = {index: scores.logprob.tolist() for index, scores in scored_here.items() if student.groups.reports_replica}
    trainer = {index: values for part in gather_objects(mine) for index, values in part.items()}
    return {name: _mean_difference(of_engine, trainer) for name, of_engine in scored.items()}


def _mean_difference(engine: Sequence[Sequence[float]], trainer: Mapping[int, Sequence[float]]) -> float:
    gaps = [
        abs(theirs - ours)
        for index, sequence in enumerate(engine)
        for theirs, ours in zip(sequence, trainer[index], strict=True)
    ]
    return math.fsum(gaps) / len(gaps)
