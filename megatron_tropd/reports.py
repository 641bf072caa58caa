"""What a step or an evaluation reports: values for people, files and plots.  Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Results of one training step, as they are shown, logged and plotted."""

    step: int
    """Number of rollout batches trained on, this one included (the first step is 1)."""
    weight_version: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: dict[str, int]
    """Response tokens of the global batch by region, lower case: ``guidance``, ``on_policy``."""
    metrics: dict[str, float]
    """Metrics of the step, most of them means over the global batch, keyed ``group/name``."""
    seconds: dict[str, float]
    """Wall seconds of rank 0 by phase: generate, score, train, push, save, eval.  The save and the evaluation after a
    step count to the next step."""
    verdict: Literal["stepped", "skipped"]


TokenRegion = Literal["guidance", "guidance_copy", "on_policy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenNumbers:
    """What the loss read at each of the R response tokens of one rollout; None where there was no such number.
    Log-probabilities, R and entropy are in nats; -inf where the teacher excludes the token."""

    region: tuple[TokenRegion, ...]
    student_logprob: tuple[float | None, ...]
    """log p(x): of a written token that in ``reward``, of guidance that of the trainer now."""
    teacher_logprob: tuple[float | None, ...]
    reward: tuple[float | None, ...]
    """R = log q(x) - log p(x) of what the student wrote."""
    trust: tuple[float | None, ...]
    """The gate's weight in [0, 1]."""
    coin: tuple[float | None, ...]
    """The uniform number of a gate that throws coins: it accepts where log coin < R."""
    teacher_entropy: tuple[float | None, ...]
    """Over the full vocabulary."""
    teacher_top: tuple[tuple[tuple[int, float], ...], ...]
    """(id, log-probability) of the teacher's most probable tokens, descending; () where the top-k was not sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Accuracy on prompts, each answered once or several times."""

    accuracy: float
    """Mean over the prompts of the share of right responses."""
    std_error: float
    """Of the mean over prompts, from the variance between them; 0 for a single prompt, which does not tell."""
    num_prompts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Accuracy of the student on held-out prompts with one way of decoding."""

    step: int
    decoding: str
    """``greedy``, ``top_p_0.7``, ``temperature_1``."""
    accuracy: float
    std_error: float
    num_prompts: int
    num_samples: int
    """Responses per prompt."""
    mean_response_len: float
    finished: float
    """Share of the responses that ended with a stop token."""
    domains: dict[str, Accuracy] = field(default_factory=dict)
    """Of the prompts of each domain; prompts without a domain are in none."""
