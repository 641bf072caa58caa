"""The source of a chunk's logits: hidden states and this rank's rows of the output tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.ops.chunk import ChunkLogits, RowGrads, RowStats, logits_gradient_, reduce_rows
from megatron_tropd.ops.divergence import DivergenceSpec
from megatron_tropd.ops.products import logits_into
from megatron_tropd.ops.shard import VocabShard
from megatron_tropd.types import Region, TokenStreams


def loss_rows(tokens: TokenStreams) -> Tensor:
    """Packed positions whose label some loss may read; prompts and padding never reach the head."""
    region = tokens.region_T
    return ((region == Region.GUIDANCE) | (region == Region.ON_POLICY)).nonzero().squeeze(1)


class _Buffer:
    """Logits of one chunk at a time, in memory that all chunks share."""

    def __init__(self, hidden: Tensor, weight: Tensor, num_rows: int, dtype: torch.dtype) -> None:
        self._hidden, self._weight = hidden, weight
        self._logits = torch.empty(num_rows, len(weight), dtype=dtype, device=hidden.device)

    def fill(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden rows [C, H], their logits [C, v]) of the positions ``index`` [C]."""
        rows = self._hidden.index_select(0, index)
        logits = self._logits[: len(index)]
        logits_into(logits, rows, self._weight)
        return rows, logits


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsSource:
    """Everything that logits are computed from, detached."""

    hidden: Tensor  # [T, H]
    weight: Tensor  # [v, H]: the rows of this rank that are not padding
    labels: Tensor  # [T]
    ids: Tensor  # [T, K]
    shard: VocabShard
    chunk_tokens: int
    dtype: torch.dtype
    """Dtype of the student's logits; the teacher's logits have the teacher's dtype, or fp32 where this is fp32."""
    overlap: bool = False
    """Whether RowStats.overlap is wanted."""
    spec: DivergenceSpec | None = None
    teacher_hidden: Tensor | None = None  # [T, H_t]
    teacher_weight: Tensor | None = None  # [v_t, H_t]

    def statistics(self, chunk: ChunkLogits) -> RowStats:
        """Statistics of one chunk; collective over the shard's group."""
        return reduce_rows(chunk, self.shard, self.spec, overlap=self.overlap)

    def gradient_(self, chunk: ChunkLogits, stats: RowStats, grads: RowGrads) -> Tensor:
        """Overwrite the chunk's logits with the gradient of the loss; no collective."""
        return logits_gradient_(chunk, stats, grads, self.spec)

    def chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor, ChunkLogits]]:
        """(positions, hidden rows, logits) for consecutive parts of ``rows``; each chunk overwrites the logits of
        the chunk before.  Without rows there is one empty chunk."""
        size = max(1, min(self.chunk_tokens, len(rows)))
        student = _Buffer(self.hidden, self.weight, size, self.dtype)
        teacher = None
        if self.teacher_hidden is not None and self.teacher_weight is not None:
            dtype = torch.float32 if self.dtype == torch.float32 else self.teacher_hidden.dtype
            teacher = _Buffer(self.teacher_hidden, self.teacher_weight, size, dtype)
        for index in rows.split(size):
            hidden, logits = student.fill(index)
            reference = None if teacher is None else teacher.fill(index)[1]
            yield (
                index,
                hidden,
                ChunkLogits.look_up(logits, reference, self.labels[index], self.ids[index], self.shard),
            )


def make_source(
    hidden: Tensor,
    weight: Tensor,
    tokens: TokenStreams,
    shard: VocabShard,
    *,
    chunk_tokens: int,
    logits_dtype: torch.dtype | None,
    overlap: bool = False,
    spec: DivergenceSpec | None = None,
    teacher_weight: Tensor | None = None,
) -> LogitsSource:
    """The source for a micro-batch: ``hidden`` [T, H], ``weight`` this rank's rows with padding.

    Raises:
        ValueError: a full-vocabulary divergence without the teacher's hidden states or its output table, or with a
            table that has more rows than the shard or another hidden size.
    """
    ids = tokens.teacher_topk_ids_TK
    if ids is None:
        ids = tokens.label_T.new_zeros(len(tokens.label_T), 0)
    if spec is not None:
        if tokens.teacher_hidden_TH is None or teacher_weight is None:
            raise ValueError(
                f"{spec.kind} over the full vocabulary needs the teacher's hidden states and its output table; given "
                f"hidden states: {tokens.teacher_hidden_TH is not None}, table: {teacher_weight is not None}"
            )
        if len(teacher_weight) > shard.num_valid or teacher_weight.shape[1] != tokens.teacher_hidden_TH.shape[1]:
            raise ValueError(
                f"the teacher's output table is {list(teacher_weight.shape)}: expected at most the {shard.num_valid} "
                f"ids of this rank and the teacher's hidden size {tokens.teacher_hidden_TH.shape[1]}"
            )
    return LogitsSource(
        hidden=hidden.detach(),
        weight=weight.detach()[: shard.num_valid],
        labels=tokens.label_T,
        ids=ids,
        shard=shard,
        chunk_tokens=chunk_tokens,
        dtype=logits_dtype or hidden.dtype,
        overlap=overlap and ids.shape[1] > 0,
        spec=spec,
        teacher_hidden=None if spec is None else tokens.teacher_hidden_TH,
        teacher_weight=None if teacher_weight is None or spec is None else teacher_weight.detach(),
    )
