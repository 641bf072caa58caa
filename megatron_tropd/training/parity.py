"""Do the engines write with the weights that were trained?  Their log-probabilities against the trainer's.

Versions and checksums say that the bytes arrived; these numbers say that both sides make the same model of
them.  Every step compares the tokens that were written; after every push to SGLang a few fixed sequences are
scored by each engine before it writes anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from megatron_tropd.data.packing import plan_batch
from megatron_tropd.parallel.exchange import gather_objects
from megatron_tropd.rollout.sglang.pool import SGLangPool
from megatron_tropd.training.prepass import prepass
from megatron_tropd.training.student import Student
from megatron_tropd.types import Prompt, Rollout

NUM_PROBES = 2
PROBE_TOKENS = 64


class ParityError(RuntimeError):
    """Engine and trainer disagree about the log-probabilities of the same tokens."""


class ParityAlarm:
    """Holds mean differences against --parity-limit.  The numbers are global, so all ranks take one branch."""

    def __init__(self, limit: float, policy: Literal["stop", "warn"]) -> None:
        self._limit, self._policy = limit, policy

    def judge(self, mean: float, what: str) -> str | None:
        """A warning to show where ``mean`` [nats] is above the limit; None where all is well.

        Raises:
            ParityError: under ``stop``.
        """
        if mean <= self._limit:  # NaN is an alarm too
            return None
        text = (
            f"{what}: the engine's log-probabilities differ from the trainer's by {mean:.3g} nats on average, above "
            f"--parity-limit {self._limit:g}; the engine holds other weights, another dtype or another temperature"
        )
        if self._policy == "stop":
            raise ParityError(f"{text} (--on-parity warn trains on)")
        return text


def probe_sequences(prompts: Sequence[Prompt]) -> tuple[Rollout, ...]:
    """The first prompts with what the teacher answered, cut short, as sequences of which all is written."""
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
        if len(probes) == NUM_PROBES:
            break
    return tuple(probes)


def probe(student: Student, engines: SGLangPool, probes: Sequence[Rollout], *, max_tokens: int) -> dict[str, float]:
    """Mean absolute difference [nats] over the probes, by engine; equal on all ranks.  Collective over the world."""
    scored = engines.score([probe.token_ids for probe in probes], student.version)
    layout = student.groups.layout
    plan = plan_batch(
        probes, num_minibatches=1, data_parallel_size=layout.dp, max_tokens=max_tokens, multiple_of=layout.tp
    )
    speaks = student.groups.is_last_stage and student.groups.coords.tp == 0
    # Scores of given tokens are over all rows of the model, also those that no other model knows.
    scored_here = prepass(student, probes, plan, vocab_size=engines.model_vocab_size)
    mine = {index: scores.logprob.tolist() for index, scores in scored_here.items() if speaks}
    trainer = {index: values for part in gather_objects(mine) for index, values in part.items()}
    return {name: _mean_difference(of_engine, trainer) for name, of_engine in scored.items()}


def _mean_difference(engine: Sequence[Sequence[float]], trainer: Mapping[int, Sequence[float]]) -> float:
    gaps = [
        abs(theirs - ours)
        for index, sequence in enumerate(engine)
        for theirs, ours in zip(sequence, trainer[index], strict=True)
    ]
    return math.fsum(gaps) / len(gaps)
