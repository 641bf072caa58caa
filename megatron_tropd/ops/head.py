"""The student's head, from hidden states to a loss: the only path from the student to an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from torch import Tensor

from megatron_tropd.objectives.base import Objective, Regions
from megatron_tropd.ops.divergence import DivergenceSpec
from megatron_tropd.ops.one_pass import OnePass, Precomputed
from megatron_tropd.ops.shard import VocabShard
from megatron_tropd.ops.source import LogitsSource, loss_rows, make_source
from megatron_tropd.ops.token_stats import RecomputedStats
from megatron_tropd.types import Metric, Needs, StepContext, TokenStats, TokenStreams

HeadMode = Literal["one-pass", "recompute", "single-chunk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """How the head computes the loss; the loss itself is the same."""

    mode: HeadMode = "one-pass"
    """``one-pass`` forms gradients in forward, chunk by chunk: three products, for row-local objectives (all of ours).
    ``recompute`` passes all labels to the objective at once and computes the logits again in backward: four products.
    ``single-chunk`` is one-pass with one chunk: the least memory traffic for the weight gradient, but [N, V / tp]
    logits exist at one time."""
    logits_dtype: torch.dtype | None = None
    """None for the model's dtype; torch.float32 for logits without bf16 rounding."""
    topk_overlap: bool = False
    """Fill TokenStats.topk_overlap_T; one more all-gather of k ids per chunk."""


DEFAULT_SETTINGS = HeadSettings()
_NO_NEEDS = Needs()


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutput:
    """Loss of a micro-batch, with everything that its labels add to the step's sums."""

    loss: Tensor  # fp32 scalar: sum of token losses; carries grad
    denominator: Tensor  # int64 scalar, these labels' part of the step's denominator
    metrics: dict[str, Metric]
    logprob_T: Tensor  # fp32, detached; the student at every label, 0 where the label is in no loss
    trust_T: Tensor | None = None  # LossOutput.trust_T of every label, likewise
    behaviour_logprob_T: Tensor | None = None  # LossOutput.behaviour_logprob_T of every label, likewise


def gather_hidden(hidden: Tensor, shard: VocabShard, *, sequence_parallel: bool) -> Tensor:
    """The last stage's output for all tokens of the micro-batch, [T, 1, H], differentiable.

    The head's gradient with respect to this output is a partial sum of this rank; backward sums it over ranks
    (all-reduce, or reduce-scatter under sequence parallelism, where ``hidden`` is [T / tp, 1, H]).
    """
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=shard.group)
    return copy_to_tensor_model_parallel_region(hidden, group=shard.group)


def student_token_stats(
    hidden: Tensor,
    weight: Tensor,
    tokens: TokenStreams,
    shard: VocabShard,
    *,
    sequence_parallel: bool,
    settings: HeadSettings = DEFAULT_SETTINGS,
    needs: Needs = _NO_NEEDS,
    teacher_weight: Tensor | None = None,
    rows: Tensor | None = None,
) -> TokenStats:
    """Statistics of the student at every position of the micro-batch, differentiable; 0 where a label is in no loss.

    Args:
        hidden: output of the last stage, [T, 1, H], or [T / tp, 1, H] under sequence parallelism.
        weight: this rank's rows of the output table, [V_padded / tp, H].
        needs: its ``divergence`` is computed, from ``tokens.teacher_hidden_TH`` and ``teacher_weight`` [v_t, H_t],
            the rows of the teacher's output table for those ids of this rank that both models know.
        rows: positions of the labels that a loss may read (``LabelRows.loss``); if None they are looked for, which
            waits for the device.
    """
    flat = gather_hidden(hidden, shard, sequence_parallel=sequence_parallel).squeeze(1)
    rows = loss_rows(tokens) if rows is None else rows
    source = _source(flat, weight, tokens, shard, len(rows), settings, needs, teacher_weight)
    label, topk, entropy, divergence, overlap = RecomputedStats.apply(flat, weight, source, rows)

    def spread(value: Tensor) -> Tensor:
        return value.new_zeros(len(flat), *value.shape[1:]).index_copy(0, rows, value)

    return TokenStats(
        logprob_T=spread(label),
        topk_logprob_TK=spread(topk) if tokens.teacher_topk_ids_TK is not None else None,
        entropy_T=spread(entropy),
        divergence_T=None if divergence is None else spread(divergence),
        topk_overlap_T=None if overlap is None else spread(overlap),
    )


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: TokenStreams,
    shard: VocabShard,
    objective: Objective,
    context: StepContext,
    *,
    sequence_parallel: bool,
    settings: HeadSettings = DEFAULT_SETTINGS,
    teacher_weight: Tensor | None = None,
    rows: Tensor | None = None,
) -> HeadOutput:
    """Loss of ``objective`` over all labels of a micro-batch, from hidden states; arguments as in
    :func:`student_token_stats`.  Collective over the shard's group.

    With ``rows`` nothing here waits for the device, with two exceptions, once per chunk: an objective that keeps a
    share of the tokens only (``Needs.entropy_quantile``), to learn how many rows the products can leave out, and
    ``topk_overlap`` where Triton does not run."""
    if settings.mode == "recompute":
        stats = student_token_stats(
            hidden, weight, tokens, shard, sequence_parallel=sequence_parallel, settings=settings,
            needs=objective.needs, teacher_weight=teacher_weight, rows=rows,
        )  # fmt: skip
        out = objective(stats, tokens, context)
        return HeadOutput(
            loss=out.token_loss_T.sum(),
            denominator=Regions.of(tokens).num_tokens if out.denominator is None else out.denominator,
            metrics=out.metrics,
            logprob_T=stats.logprob_T.detach(),
            trust_T=out.trust_T,
            behaviour_logprob_T=out.behaviour_logprob_T,
        )
    flat = gather_hidden(hidden, shard, sequence_parallel=sequence_parallel).squeeze(1)
    rows = loss_rows(tokens) if rows is None else rows
    grad = torch.is_grad_enabled()
    with torch.no_grad():
        work = OnePass(
            source=_source(flat, weight, tokens, shard, len(rows), settings, objective.needs, teacher_weight),
            objective=objective,
            tokens=tokens,
            context=context,
            weight=weight,
            to_hidden=grad and flat.requires_grad,
            to_weight=grad and weight.requires_grad,
            drop_rows=not flat.is_cuda or objective.needs.entropy_quantile is not None,
        )
        totals, gradients, labels = work.run(rows)
    return HeadOutput(
        loss=Precomputed.apply(flat, weight, totals.loss.float(), gradients),
        denominator=totals.denominator,
        metrics=totals.metrics,
        logprob_T=labels.logprob_T,
        trust_T=labels.trust_T,
        behaviour_logprob_T=labels.behaviour_logprob_T,
    )


def _source(
    flat: Tensor,
    weight: Tensor,
    tokens: TokenStreams,
    shard: VocabShard,
    num_rows: int,
    settings: HeadSettings,
    needs: Needs,
    teacher_weight: Tensor | None,
) -> LogitsSource:
    return make_source(
        flat,
        weight,
        tokens,
        shard,
        chunk_tokens=num_rows if settings.mode == "single-chunk" else shard.chunk_tokens,
        logits_dtype=settings.logits_dtype,
        overlap=settings.topk_overlap,
        spec=None if needs.divergence is None else DivergenceSpec(kind=needs.divergence, beta=needs.divergence_beta),
        teacher_weight=teacher_weight,
    )
