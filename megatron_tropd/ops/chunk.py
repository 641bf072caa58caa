"""One chunk of tokens: its logits on this rank, their statistics over all ranks, and the gradient of the logits.

With z the logits, m their maximum, S = sum exp(z - m):

    log p_j = z_j - m - log S          H = log S - (sum exp(z - m) (z - m)) / S

and for upstream gradients g_x (label), g_v (the k ids), g_H (entropy), g_D (divergence D)

    dL/dz_j = g_x [j = x] + sum_v g_v [j = v] - (g_x + sum_v g_v) p_j - g_H p_j (log p_j + H) + g_D dD/dz_j

Two collectives per chunk: one MAX and one packed SUM of [sum exp, sum exp * shifted, label logit, k gathered logits,
terms of the divergence]; a third, SUM, for the jsd alone.  The gradient needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.ops import divergence as full
from megatron_tropd.ops.divergence import DivergenceSpec, DivergenceStats
from megatron_tropd.ops.records import map_tensors
from megatron_tropd.ops.rows import (
    compact_,
    finite,
    rescale,
    row_blocks,
    row_partials,
    shifted,
    softmax_gradient_,
    softmax_term,
)
from megatron_tropd.ops.shard import VocabShard
from megatron_tropd.ops.topk import topk_overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLogits:
    """This rank's logits of C tokens, with the columns and the logits of the looked-up ids."""

    student: Tensor  # [C, v]
    teacher: Tensor | None  # [C, v_t], v_t <= v: the ids both models know
    ids: Tensor  # [C, K] global
    columns: Tensor  # [C, 1 + K] local columns of the label and of the k ids
    mine: Tensor  # [C, 1 + K] bool, whether this rank owns the id
    found: Tensor  # [C, 1 + K] fp32, this rank's logits at ``columns``
    teacher_found: Tensor | None  # [C, 1 + K] fp32

    @classmethod
    def look_up(
        cls, student: Tensor, teacher: Tensor | None, labels: Tensor, ids: Tensor, shard: VocabShard
    ) -> ChunkLogits:
        """Look up the label and the k ids of every token; ``labels`` [C] and ``ids`` [C, K] are global."""
        columns, mine = shard.columns(torch.cat([labels[:, None], ids], 1))
        return cls(
            student=student,
            teacher=teacher,
            ids=ids,
            columns=columns,
            mine=mine,
            found=_gather(student, columns),
            teacher_found=None if teacher is None else _gather_teacher(teacher, columns),
        )

    def keep(self, index: Tensor) -> ChunkLogits:
        """Keep only the rows at ascending ``index``, in the same memory; the other rows are overwritten."""
        return map_tensors(self, lambda rows: compact_(rows, index))


def _gather(logits: Tensor, columns: Tensor) -> Tensor:
    if logits.shape[1] == 0:
        return torch.zeros(columns.shape, device=columns.device)
    return logits.gather(1, columns).float()


def _gather_teacher(teacher: Tensor, columns: Tensor) -> Tensor:
    """The teacher's logits at ``columns``; -inf where only the student has the id."""
    found = _gather(teacher, columns.clamp(max=max(teacher.shape[1] - 1, 0)))
    return found.masked_fill(columns >= teacher.shape[1], -torch.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStats:
    """Statistics of C rows, reduced over the vocabulary, fp32."""

    maximum: Tensor  # [C]
    log_sum: Tensor  # [C]
    label_logprob: Tensor  # [C]
    id_logprobs: Tensor  # [C, K]
    entropy: Tensor  # [C]
    divergence: DivergenceStats | None = None
    overlap: Tensor | None = None  # [C] share of the k ids in the row's own top-k

    def take(self, index: Tensor | slice) -> RowStats:
        """The rows at ``index``."""
        return map_tensors(self, lambda rows: rows[index])


def reduce_rows(
    chunk: ChunkLogits, shard: VocabShard, spec: DivergenceSpec | None = None, *, overlap: bool = False
) -> RowStats:
    """Statistics of every row over the whole vocabulary; collective over the shard's group."""
    partials = [row_partials(part) for part in (chunk.student, chunk.teacher) if part is not None]
    maxima = shard.max(torch.stack([part[0] for part in partials]))
    maximum = finite(maxima[0])
    parts = [*rescale(partials[0], maximum)]
    if spec is not None and chunk.teacher is not None:
        parts.append(rescale(partials[1], finite(maxima[1]))[0])
        parts.extend(full.pair_sums(spec, chunk.student, chunk.teacher, maximum, finite(maxima[1])))
    found = torch.where(chunk.mine, chunk.found - maximum[:, None], 0.0)
    packed = shard.sum(torch.cat([torch.stack(parts, 1), found], 1))
    sums, found = packed[:, : len(parts)].t(), packed[:, len(parts) :]
    log_sum = sums[0].log()
    logprobs = found - log_sum[:, None]
    divergence = None
    if spec is not None and chunk.teacher is not None:
        divergence = full.finish(
            spec, chunk.student, chunk.teacher, sums[3:], (maximum, log_sum), (finite(maxima[1]), sums[2].log()), shard
        )
    return RowStats(
        maximum=maximum,
        log_sum=log_sum,
        label_logprob=logprobs[:, 0],
        id_logprobs=logprobs[:, 1:],
        entropy=log_sum - sums[1] / sums[0],
        divergence=divergence,
        overlap=topk_overlap(chunk.student, chunk.ids, shard) if overlap else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowGrads:
    """Gradient of the loss with respect to each of the statistics, fp32; None for zero."""

    label: Tensor  # [C]
    ids: Tensor  # [C, K]
    entropy: Tensor | None  # [C]
    divergence: Tensor | None  # [C]

    def active(self) -> Tensor:
        """bool [C], true for rows in which any gradient is not zero."""
        out = (self.label != 0) | (self.ids != 0).any(1)
        for extra in (self.entropy, self.divergence):
            if extra is not None:
                out = out | (extra != 0)
        return out

    def take(self, index: Tensor | slice) -> RowGrads:
        """The rows at ``index``."""
        return map_tensors(self, lambda rows: rows[index])


def logits_gradient_(chunk: ChunkLogits, stats: RowStats, grads: RowGrads, spec: DivergenceSpec | None) -> Tensor:
    """Overwrite the chunk's student logits with the gradient of the loss; returns the same tensor [C, v].

    The entries at looked-up ids are computed in fp32 from the logits saved before and written once: if they were
    added to a bf16 softmax, they would carry its rounding error.
    """
    if chunk.student.shape[1] == 0:
        return chunk.student
    inverse = (-stats.log_sum).exp()
    scale = -(grads.label + grads.ids.sum(1)) * inverse
    slope = None if grads.entropy is None else grads.entropy * inverse
    offset = stats.entropy - stats.log_sum
    entries = softmax_term(chunk.found - stats.maximum[:, None], scale, slope, offset)
    extra = grads.divergence if spec is not None else None
    if extra is not None:
        assert spec is not None and chunk.teacher_found is not None
        entries += extra[:, None] * _divergence_gradient(spec, stats, chunk.found, chunk.teacher_found)
    entries += _totals(chunk.columns, torch.cat([grads.label[:, None], grads.ids], 1) * chunk.mine)
    if extra is None:
        softmax_gradient_(chunk.student, stats.maximum, scale, slope, offset)
    else:
        assert spec is not None and chunk.teacher is not None
        width = chunk.student.shape[1]
        for rows in row_blocks(chunk.student):
            block, part = chunk.student[rows], stats.take(rows)
            dense = softmax_term(
                shifted(block, part.maximum), scale[rows], None if slope is None else slope[rows], offset[rows]
            )
            teacher = full.pad_teacher(chunk.teacher[rows], width)
            block.copy_(dense.add_(extra[rows, None] * _divergence_gradient(spec, part, block, teacher)))
    return chunk.student.scatter_(1, chunk.columns, entries.to(chunk.student.dtype))


def _divergence_gradient(spec: DivergenceSpec, stats: RowStats, logits: Tensor, teacher: Tensor) -> Tensor:
    assert stats.divergence is not None
    z = shifted(logits, stats.maximum)
    return full.gradient_term(spec, stats.divergence, z, stats.log_sum, teacher)


def _totals(columns: Tensor, values: Tensor) -> Tensor:
    """For every entry, the sum of ``values`` [C, n] over all entries of the row with the same column.

    An id may repeat (the sampled token is usually in the teacher's top-k), and all entries with the same column must
    be written with the same number.
    """
    if columns.shape[1] == 1:
        return values
    ordered, order = columns.sort(1)
    # The running sum as a product: torch calls cumsum of floating point on CUDA not deterministic.
    sums = (
        values.double().gather(1, order)
        @ torch.ones(columns.shape[1], columns.shape[1], dtype=torch.float64, device=columns.device).triu()
    )
    last = torch.searchsorted(ordered, columns, right=True) - 1
    first = torch.searchsorted(ordered, columns) - 1
    before = torch.where(first >= 0, sums.gather(1, first.clamp(min=0)), 0.0)
    return (sums.gather(1, last) - before).float()
