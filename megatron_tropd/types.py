"""The records that are passed between the parts of the package.  Imports only torch.

Shape legend: ``T`` labels of one micro-batch or of a part of it, ``K`` ids of a top-k, ``H`` a hidden
size, ``L`` tokens of one sequence (prompt + response), ``R`` its response tokens, ``W`` response tokens the
student wrote.
Every record is frozen, slotted and keyword-only; code makes new records instead of changing old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor


class Region(IntEnum):
    """The role of a token in the loss; one stream of regions replaces many masks."""

    PAD = 0
    """Padding up to the micro-batch shape; never read by a loss."""
    PROMPT = 1
    """The prompt; never read by a loss."""
    GUIDANCE = 2
    """Teacher prefix that the student continues; imitated with weight beta."""
    ON_POLICY = 3
    """Written by the student in this step; of a method that learns from a teacher on the responses of the data
    (``kd``), these."""
    GUIDANCE_COPY = 4
    """The same teacher prefix in the 2nd, 3rd, ... sample of a prompt: only context, so that a prefix
    counts once per prompt (docs/objectives.md, regions and denominators)."""


GraderKind = Literal["exact", "math", "choice", "instructions", "code"]
"""How it is judged whether a response is right (docs/grading.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the prompt file, tokenized."""

    uid: int
    """Unique, stable across runs: given by the data, or the row number in the file(s)."""
    token_ids: tuple[int, ...]
    teacher_response_ids: tuple[int, ...] | None = None
    """A response that the teacher wrote, ending in its stop token unless it was cut; None if the row has none."""
    teacher_response_len: int | None = None
    """Tokens of the whole response with its stop token, more than ``teacher_response_ids`` has where it was cut; None
    where it was not."""
    answer: str | None = None
    grader: str = ""
    """The GraderKind that the row names; "" for the run's own."""
    domain: str = ""
    name: str = ""
    """The text by which the data names the row (--uid-key); "" if it has none."""

    @property
    def whole_response_len(self) -> int:
        """Tokens of the teacher's whole response with its stop token; 0 if there is none."""
        if self.teacher_response_len is not None:
            return self.teacher_response_len
        return len(self.teacher_response_ids or ())

    @property
    def is_cut(self) -> bool:
        """Whether only the first tokens of the teacher's response were kept."""
        return self.whole_response_len > len(self.teacher_response_ids or ())


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
    logprobs: tuple[float, ...]  # [W] of the written tokens, at the sampling temperature; 0 for those of the data
    weight_version: tuple[int, int]
    """(lowest, highest) weight version that wrote a token of it."""
    finish: Finish
    topk_ids: Tensor | None = field(default=None, compare=False)  # [W, K] int32
    """The student's own most probable ids where each written token stands, in any order; None where the objective does
    not ask for them."""

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


Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopkUse:
    """The tokens whose loss may read the teacher's top-k, where it is not all that the student wrote; plain numbers, so
    that a teacher anywhere can be asked for them (``objectives/topk_use.py`` finds the tokens)."""

    kind: Literal["bernoulli", "reward", "probability", "teacher_entropy"]
    """Certain not to need it: log u < R, R > limit, q(x) - p(x) > limit, H_q <= limit."""
    limit: float = 0.0
    margin: float = 0.0
    """Nats by which the engine's log p(x) may be below the trainer's."""
    share: float = 0.0
    """Share of the samples whose top-k comes whole, for metrics of it."""
    seed: int = 0
    """Of the coins, with ``step``."""
    step: int = 0


TopkOf = Literal["teacher", "student"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an objective needs besides the student's log-probability of every label."""

    top_k: int = 0
    """Number of most probable tokens per position whose log-probabilities the teacher sends; 0 for none."""
    topk_of: TopkOf = "teacher"
    """Whose most probable tokens these are; the log-probabilities of them are always asked of the teacher."""
    topk_use: TopkUse | None = None
    """The tokens that the top-k is for; None for all that the student wrote."""
    teacher_entropy: bool = False
    """Full-vocabulary entropy of the teacher."""
    divergence: Divergence | None = None
    """A full-vocabulary divergence; the teacher then sends its hidden states."""
    divergence_beta: float = 0.5
    """Weight of the teacher in the mixture of ``divergence="jsd"``."""
    reference_logprob: bool = False
    """Log-probabilities of a third, frozen model (G-OPD)."""
    old_logprob: bool = False
    """The student's own log-probabilities before the first update on a rollout batch, from an extra forward
    pass; if False, the current ones are used, detached (the same with one update per batch)."""
    entropy_quantile: float | None = None
    """Share of the global batch's on-policy tokens, those of highest student entropy, that the objective
    selects; the threshold comes from the same extra forward pass."""
    rewards: bool = False
    """Group advantages from a reward function."""
    coin: bool = False
    """The gate reads ``TokenStreams.uniform_T``."""
    teacher: bool = True
    """False: the objective does not use the teacher, and none is built."""
    rollouts: bool = True
    """False: nothing is generated; the student learns from the responses of the data.  Without a teacher they are
    GUIDANCE (supervised finetuning), with one ON_POLICY, the region whose tokens a teacher scores."""

    @property
    def score(self) -> ScoreRequest:
        """What the teacher has to compute, with the top-k of all tokens; ``objectives/topk_use.py::request_of`` asks
        for those that are needed."""
        return ScoreRequest(
            top_k=self.top_k, topk_of=self.topk_of, entropy=self.teacher_entropy, hidden=self.divergence is not None
        )

    @property
    def student_top_k(self) -> int:
        """Number of the student's own most probable ids that rollouts bring, 0 for none."""
        return self.top_k if self.topk_of == "student" else 0

    @property
    def old_policy(self) -> bool:
        """Whether the extra forward pass before the first update on a rollout batch is needed."""
        return self.old_logprob or self.entropy_quantile is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What a frozen model has to compute besides the log-probability of every response token."""

    top_k: int = 0
    """Number of most probable tokens per position; 0 for none."""
    topk_of: TopkOf = "teacher"
    """The model's own most probable tokens, or those that the rollouts bring (``Rollout.topk_ids``)."""
    topk_use: TopkUse | None = None
    """The tokens that the top-k is for; a scorer may also send it for all."""
    entropy: bool = False
    hidden: bool = False
    """The last hidden states, from which the student's ranks compute the teacher's logits chunk by chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """A model's scores of the response tokens of one rollout.  Log-probabilities and entropy are fp32, in nats.

    Of a prefix only the log-probability is ever read, so all other fields cover only the W written tokens, and the
    top-k those of them that need it, where the request says which.
    """

    logprob: Tensor  # [R] log q(x_t | x_<t) of every response token
    topk_rows: Tensor | None = None  # [S] int32, ascending: the written tokens with a top-k; None for all, S = W
    topk_ids: Tensor | None = None  # [S, K] int32, by (log-probability descending, id ascending), or as given
    topk_logprobs: Tensor | None = None  # [S, K]
    entropy: Tensor | None = None  # [W] over the full vocabulary
    hidden: Tensor | None = None  # [W, H_teacher], in the teacher's dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStreams:
    """The inputs of the loss for every label, apart from the student's own outputs; one entry per label.

    Holds a whole packed micro-batch or any selection of its labels (:meth:`rows`); objectives treat both alike.
    An optional stream is present only if the objective's ``Needs`` require it.
    """

    label_T: Tensor  # int64; 0 where region is PAD
    region_T: Tensor  # uint8, the Region of the label
    sample_uid_T: Tensor  # int64, encodes (prompt uid, sample index); -1 on padding
    label_position_T: Tensor  # int64, index of the label inside its sequence
    uniform_T: Tensor  # float64 in (0, 1), the gate's coin (rng.py); 0.5 where it was not filled in
    rollout_logprob_T: Tensor  # fp32 by the engine that sampled, 0 where not ON_POLICY
    written_len_T: Tensor  # int64, ON_POLICY labels of the whole sample; 0 on padding
    teacher_logprob_T: Tensor  # fp32, 0 where not a response token
    teacher_topk_ids_TK: Tensor | None = None  # int64
    teacher_topk_logprob_TK: Tensor | None = None  # fp32, -inf where not ON_POLICY, or not sent (Needs.topk_use)
    teacher_entropy_T: Tensor | None = None  # fp32, 0 where not ON_POLICY
    teacher_hidden_TH: Tensor | None = None  # the teacher's dtype, 0 where not ON_POLICY
    reference_logprob_T: Tensor | None = None  # fp32
    old_logprob_T: Tensor | None = None  # fp32, the student before the first update on this batch
    old_entropy_T: Tensor | None = None  # fp32, from the same pass
    sequence_error_T: Tensor | None = None  # fp32, mean over the sample of exp |old - rollout log-probability|
    advantage_T: Tensor | None = None  # fp32, group advantage of the sample, 0 where not ON_POLICY
    sample_start_T: Tensor | None = None  # bool, the first ON_POLICY label of its sample: one True per sample

    def rows(self, index: Tensor) -> TokenStreams:
        """Return the labels at ``index`` [N] (int64), in that order."""
        return TokenStreams(**{name: value[index] for name, value in self._present()})

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenStreams:
        """Return the streams with ``change`` of every tensor."""
        return TokenStreams(**{name: change(value) for name, value in self._present()})

    def _present(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.__dataclass_fields__:
            if (value := getattr(self, name)) is not None:
                yield name, value


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRows:
    """Packed positions of the labels of each role, ascending, int64.  They are found on the CPU, where the batch is
    packed: to find them on a GPU would be to wait for it."""

    loss: Tensor  # GUIDANCE and ON_POLICY: what a loss may read
    response: Tensor  # all response tokens
    prefix: Tensor  # GUIDANCE and GUIDANCE_COPY
    written: Tensor  # ON_POLICY

    @classmethod
    def of(cls, region_T: Tensor) -> LabelRows:
        """The rows of a micro-batch's regions."""

        def rows(mask_T: Tensor) -> Tensor:
            return mask_T.nonzero().squeeze(1)

        written_T, guidance_T = region_T == Region.ON_POLICY, region_T == Region.GUIDANCE
        return cls(
            loss=rows(written_T | guidance_T),
            response=rows(region_T > Region.PROMPT),
            prefix=rows(guidance_T | (region_T == Region.GUIDANCE_COPY)),
            written=rows(written_T),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> LabelRows:
        """Return the rows with ``change`` of every tensor."""
        return LabelRows(**{name: change(getattr(self, name)) for name in self.__dataclass_fields__})


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Packed sequences for one forward pass.  Position t holds token_T[t] and the label of the NEXT
    token; ``streams`` is aligned with the labels."""

    token_T: Tensor  # int64
    position_T: Tensor  # int64, restarts at 0 in every sequence
    cu_seqlens: Tensor  # int32 [num_sequences + 1], the last entry is T (padding is a sequence) of all context ranks
    max_seqlen: int
    streams: TokenStreams
    rows: LabelRows

    def to(self, device: torch.device) -> Microbatch:
        """Return the same micro-batch with every tensor on ``device``.  From pinned memory the copies are only begun:
        what is computed on the device waits for them, the host does not."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Microbatch:
        """Return the same micro-batch in pinned host memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Microbatch:
        return Microbatch(
            token_T=change(self.token_T),
            position_T=change(self.position_T),
            cu_seqlens=change(self.cu_seqlens),
            max_seqlen=self.max_seqlen,
            streams=self.streams.map(change),
            rows=self.rows.map(change),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStats:
    """The student's statistics of every label, reduced over the vocabulary shards; fp32."""

    logprob_T: Tensor  # carries grad
    topk_logprob_TK: Tensor | None = None  # carries grad; the student at the ids of the top-k (Needs.topk_of)
    entropy_T: Tensor | None = None  # carries grad
    divergence_T: Tensor | None = None  # carries grad; Needs.divergence over the full vocabulary
    topk_overlap_T: Tensor | None = None  # detached share of the teacher's top-k ids in the student's own top-k


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """Values that hold for the whole step."""

    step: int = 0
    """Number of rollout batches before this one."""
    num_steps: int = 1
    """--train-iters."""
    entropy_threshold: float | None = None
    """The (1 - Needs.entropy_quantile) quantile of the global batch's student entropies; exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A mean as sum and count, which combines exactly over micro-batches and ranks: add both, then divide."""

    total: Tensor  # fp64 scalar, detached
    count: Tensor  # fp64 scalar, detached


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of every token, not yet divided by the denominator."""

    token_loss_T: Tensor  # carries grad; exactly 0 for labels that the objective does not use
    metrics: dict[str, Metric] = field(default_factory=dict)
    denominator: Tensor | None = None
    """int64 scalar: the contribution of these labels to the denominator of the update; None for the number of
    ON_POLICY and GUIDANCE labels."""
    trust_T: Tensor | None = None
    """The gate's weight in [0, 1] of every ON_POLICY label, detached; None for an objective without a gate."""
    behaviour_logprob_T: Tensor | None = None
    """The student's log p(x) that the reward R of every ON_POLICY label is made with, detached; None where there is no
    such reward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How far a phase of a step has come, on one rank."""

    done: int
    total: int
    unit: str
    """What is counted, in the plural: ``responses``, ``micro-batches``."""
