"""The values that travel between rooms.  Torch is the only import.

Shape legend: ``T`` packed tokens of one micro-batch, ``K`` the teacher's top-k, ``L`` tokens of one
sequence (prompt + response), ``R`` its response tokens, ``W`` response tokens the student wrote.
Every record is frozen, slotted and keyword-only; a step makes new ones, it never edits old ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor


class Region(IntEnum):
    """What a token is to the loss.  One label stream instead of many masks."""

    PAD = 0
    """Filler up to the micro-batch shape; never read by a loss."""
    PROMPT = 1
    """Given text; never read by a loss."""
    GUIDANCE = 2
    """Teacher prefix the student continues from; imitated with weight beta."""
    ON_POLICY = 3
    """Written by the student in this step."""
    GUIDANCE_COPY = 4
    """Teacher prefix repeated in the 2nd, 3rd, ... sample of one prompt: context only, so that a
    prefix counts once per prompt (algorithms: row 7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the prompt file, tokenized."""

    uid: int
    """Unique, stable across runs: the row number in the file(s)."""
    token_ids: tuple[int, ...]
    teacher_response_ids: tuple[int, ...] | None = None
    """A response the teacher wrote, ending in its stop token; None where the file has none."""
    answer: str | None = None
    domain: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One continuation to write: ``token_ids`` is prompt + guidance."""

    prompt_uid: int
    sample_index: int
    token_ids: tuple[int, ...]
    prompt_len: int
    guidance_len: int
    max_new_tokens: int


Finish = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """A finished sequence: prompt, guidance, then what the student wrote."""

    prompt_uid: int
    sample_index: int
    token_ids: tuple[int, ...]  # [L]
    prompt_len: int
    guidance_len: int
    logprobs: tuple[float, ...]  # [W] of the written tokens, at the sampling temperature
    weight_version: tuple[int, int]
    """(lowest, highest) weight version that wrote a token of it."""
    finish: Finish

    def __post_init__(self) -> None:
        written = len(self.token_ids) - self.prompt_len - self.guidance_len
        if written < 0 or self.prompt_len < 1 or self.guidance_len < 0:
            raise ValueError(
                f"rollout of prompt {self.prompt_uid}: prompt_len {self.prompt_len} and guidance_len "
                f"{self.guidance_len} do not fit {len(self.token_ids)} tokens"
            )
        if len(self.logprobs) != written:
            raise ValueError(
                f"rollout of prompt {self.prompt_uid}: {written} written tokens but "
                f"{len(self.logprobs)} log-probabilities"
            )

    @property
    def response_len(self) -> int:
        """Guidance and written tokens together."""
        return len(self.token_ids) - self.prompt_len


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What an objective wants to hear from the teacher."""

    top_k: int = 0
    """Size of the exact top-k payload; 0 for none."""
    entropy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """The teacher's payload for the response tokens of one rollout, all fp32 natural logs."""

    logprob: Tensor  # [R] log q(x_t | x_<t) of the token that stands there
    topk_ids: Tensor | None = None  # [R, K] int32, by (log-probability descending, id ascending)
    topk_logprobs: Tensor | None = None  # [R, K]
    entropy: Tensor | None = None  # [R] over the full vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Packed sequences for one forward pass.  Position t holds token_T[t] and the label of the NEXT
    token: label_T[t], and every per-label stream below is aligned with label_T."""

    token_T: Tensor  # int64
    label_T: Tensor  # int64; 0 where region is PAD
    position_T: Tensor  # int64, restarts at 0 in every sequence
    cu_seqlens: Tensor  # int32 [num_sequences + 1], the last entry is T (padding is a sequence)
    max_seqlen: int
    region_T: Tensor  # uint8, the Region of label_T
    rollout_logprob_T: Tensor  # fp32, 0 where not ON_POLICY
    teacher_logprob_T: Tensor  # fp32, 0 where not a response token
    teacher_topk_ids_TK: Tensor | None  # int64
    teacher_topk_logprob_TK: Tensor | None  # fp32, -inf where not a response token
    teacher_entropy_T: Tensor | None  # fp32
    sample_uid_T: Tensor  # int64, names (prompt uid, sample index); -1 on padding
    label_position_T: Tensor  # int64, index of the label inside its sequence

    def to(self, device: torch.device) -> Microbatch:
        """The same micro-batch with every tensor on ``device``."""
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value := getattr(self, name), Tensor) else value
            for name in self.__dataclass_fields__
        }
        return Microbatch(**moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """The student at every packed position, already reduced over the vocabulary shards."""

    logprob_T: Tensor  # fp32, carries grad
    topk_logprob_TK: Tensor | None  # fp32, carries grad; the student at the TEACHER's ids
    entropy_T: Tensor | None  # fp32, carries grad


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A mean that reduces exactly over micro-batches and ranks: add sums and counts, then divide."""

    total: Tensor  # fp64 scalar, detached
    count: Tensor  # fp64 scalar, detached


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of every token, not divided by anything."""

    token_loss_T: Tensor  # carries grad; exactly 0 where the objective reads nothing
    metrics: dict[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One training step, as it is shown, logged and plotted: one JSON line."""

    step: int
    """Number of optimizer updates done, this one included (the first step is 1)."""
    weight_version: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: dict[str, int]
    """Response tokens of the global batch by region, lower case: ``guidance``, ``on_policy``."""
    metrics: dict[str, float]
    """Means over the global batch, keyed ``group/name``."""
    seconds: dict[str, float]
    """Wall seconds of rank 0 by phase: generate, score, train, push, save."""
    verdict: Literal["stepped", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Accuracy of the student on held-out prompts with one way of decoding."""

    step: int
    decoding: str
    """``greedy``, ``top_p_0.7``, ``temperature_1``."""
    accuracy: float
    num_prompts: int
    mean_response_len: float
    finished: float
    """Share of responses that ended with a stop token."""
