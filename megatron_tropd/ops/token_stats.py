"""Statistics that autograd can use in any way: backward computes the chunks' logits again (four products in all)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_tropd.ops.chunk import RowGrads
from megatron_tropd.ops.products import add_weight_gradient, hidden_gradient
from megatron_tropd.ops.records import cat_records
from megatron_tropd.ops.source import LogitsSource
from megatron_tropd.ops.weight_gradient import accumulator, deliver


class RecomputedStats(torch.autograd.Function):
    """(hidden [T, H], weight [rows, H]) -> label log-probability [N], id log-probabilities [N, K], entropy [N],
    divergence [N] or None, top-k overlap [N] or None, of the N positions ``rows``.  Backward has no collective."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, source: LogitsSource, rows: Tensor
    ) -> tuple[Tensor | None, ...]:
        """See the class."""
        stats = cat_records([source.statistics(chunk) for _, _, chunk in source.chunks(rows)])
        ctx.source, ctx.rows, ctx.stats, ctx.weight = source, rows, stats, weight
        ctx.set_materialize_grads(False)
        if stats.overlap is not None:
            ctx.mark_non_differentiable(stats.overlap)
        divergence = None if stats.divergence is None else stats.divergence.value.clone()
        return stats.label_logprob.clone(), stats.id_logprobs.clone(), stats.entropy.clone(), divergence, stats.overlap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """See the class."""
        source: LogitsSource = ctx.source
        every = RowGrads(
            label=torch.zeros_like(ctx.stats.label_logprob) if grads[0] is None else grads[0],
            ids=torch.zeros_like(ctx.stats.id_logprobs) if grads[1] is None else grads[1],
            entropy=grads[2],
            divergence=grads[3],
        )
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(source.hidden) if to_hidden else None
        total = accumulator(ctx.weight, now=True) if to_weight else None
        start = 0
        for index, hidden, chunk in source.chunks(ctx.rows):
            part = slice(start, start + len(index))
            start += len(index)
            grad = source.gradient_(chunk, ctx.stats.take(part), every.take(part))
            if grad_hidden is not None:
                grad_hidden[index] = hidden_gradient(grad, source.weight)
            if total is not None:
                add_weight_gradient(total[: source.shard.num_valid], grad, hidden)
        return grad_hidden, None if total is None else deliver(ctx.weight, total), None, None
