"""Loss and gradients of a micro-batch in one pass over its logits: three matrix products.

A row-local objective's gradient with respect to a chunk's statistics is known as soon as the chunk's statistics are,
so the gradient takes the place of the logits in the same memory and goes straight into the hidden and weight gradients.
Backward only multiplies by the gradient of the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.objectives.base import Objective, Regions
from megatron_tropd.ops.chunk import ChunkLogits, RowGrads, RowStats
from megatron_tropd.ops.products import add_weight_gradient, hidden_gradient
from megatron_tropd.ops.records import map_tensors
from megatron_tropd.ops.source import LogitsSource
from megatron_tropd.ops.weight_gradient import accumulator, deliver
from megatron_tropd.types import LossOutput, Metric, StepContext, TokenStats, TokenStreams

_WORTH_MOVING = 7 / 8
"""Rows without a gradient are dropped if at most this share of rows has one; dropping them costs a copy of the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Gradients kept from forward to backward; None where no gradient is wanted."""

    hidden: Tensor | None  # [T, H], the model's dtype
    weight: Tensor | None  # [rows, H] fp32


class Precomputed(torch.autograd.Function):
    """``loss`` as a function of (hidden, weight), whose gradients are already known."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: Tensor, gradients: Gradients) -> Tensor:
        """See the class."""
        ctx.weight = weight
        ctx.save_for_backward(*(g for g in (gradients.hidden, gradients.weight) if g is not None))
        ctx.has = (gradients.hidden is not None, gradients.weight is not None)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply by the upstream factor in fp32: a rounding error of the factor would scale every gradient."""
        saved = list(ctx.saved_tensors)
        hidden = saved.pop(0) if ctx.has[0] else None
        weight = saved.pop(0) if ctx.has[1] else None
        return (
            None if hidden is None else (hidden.float() * upstream).to(hidden.dtype),
            None if weight is None else deliver(ctx.weight, weight, upstream),
            None,
            None,
        )


class Totals:
    """Sums of the objective's outputs over chunks."""

    def __init__(self, device: torch.device) -> None:
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.denominator = torch.zeros((), dtype=torch.int64, device=device)
        self.metrics: dict[str, Metric] = {}

    def add(self, out: LossOutput, tokens: TokenStreams) -> None:
        """Add the outputs of one chunk."""
        self.loss += out.token_loss_T.detach().sum(dtype=torch.float64)
        self.denominator += Regions.of(tokens).num_tokens if out.denominator is None else out.denominator
        for name, metric in out.metrics.items():
            old = self.metrics.get(name)
            self.metrics[name] = (
                metric if old is None else Metric(total=old.total + metric.total, count=old.count + metric.count)
            )


class PerLabel:
    """What is kept of every label [T], fp32 and detached; 0 where a label is in no loss."""

    def __init__(self, num_labels: int, device: torch.device) -> None:
        self.logprob_T = torch.zeros(num_labels, device=device)
        self.trust_T: Tensor | None = None
        """None where the objective has no gate."""
        self.behaviour_logprob_T: Tensor | None = None
        """None where the objective has no reward."""

    def write(self, index: Tensor, logprob: Tensor, out: LossOutput) -> None:
        """Write the numbers of the labels of one chunk."""
        self.logprob_T[index] = logprob
        self.trust_T = self._written(self.trust_T, index, out.trust_T)
        self.behaviour_logprob_T = self._written(self.behaviour_logprob_T, index, out.behaviour_logprob_T)

    def _written(self, target_T: Tensor | None, index: Tensor, value: Tensor | None) -> Tensor | None:
        if value is None:
            return target_T
        target_T = torch.zeros_like(self.logprob_T) if target_T is None else target_T
        target_T[index] = value.to(target_T)
        return target_T


_DIFFERENTIABLE = ("logprob_T", "topk_logprob_TK", "entropy_T", "divergence_T")


def _token_stats(stats: RowStats, tokens: TokenStreams) -> TokenStats:
    """A chunk's statistics as an objective sees them."""
    return TokenStats(
        logprob_T=stats.label_logprob,
        topk_logprob_TK=stats.id_logprobs if tokens.teacher_topk_ids_TK is not None else None,
        entropy_T=stats.entropy,
        divergence_T=None if stats.divergence is None else stats.divergence.value,
        topk_overlap_T=None if stats.overlap is None else stats.overlap.detach(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OnePass:
    """The work of one micro-batch; :meth:`run` is collective over the shard's group."""

    source: LogitsSource
    objective: Objective
    tokens: TokenStreams
    context: StepContext
    weight: Tensor
    """The parameter itself."""
    to_hidden: bool
    to_weight: bool
    drop_rows: bool
    """Whether rows without a gradient are looked for and left out of the products; on a GPU the host waits for it."""

    def run(self, rows: Tensor) -> tuple[Totals, Gradients, PerLabel]:
        """(sums, gradients of the summed loss, numbers of every label) over the positions ``rows``."""
        hidden = self.source.hidden
        totals, labels = Totals(hidden.device), PerLabel(len(hidden), hidden.device)
        gradients = Gradients(
            hidden=torch.zeros_like(hidden) if self.to_hidden else None,
            weight=accumulator(self.weight, now=False) if self.to_weight else None,
        )
        for index, chunk_hidden, chunk in self.source.chunks(rows):
            stats = self.source.statistics(chunk)
            tokens = self.tokens.rows(index)
            grads = None
            if self.to_hidden or self.to_weight:
                out, grads = self._differentiate(stats, tokens)
            else:
                out = self.objective(_token_stats(stats, tokens), tokens, self.context)
            totals.add(out, tokens)
            labels.write(index, stats.label_logprob, out)
            if grads is not None:
                self._products(index, chunk_hidden, chunk, stats, grads, gradients)
        return totals, gradients, labels

    def _differentiate(self, stats: RowStats, tokens: TokenStreams) -> tuple[LossOutput, RowGrads]:
        """Loss and its gradients by autograd through the objective alone, on tensors of [C] and [C, K]."""
        leaves = _token_stats(map_tensors(stats, lambda value: value.detach().requires_grad_()), tokens)
        wanted = {name: value for name in _DIFFERENTIABLE if (value := getattr(leaves, name)) is not None}
        with torch.enable_grad():
            out = self.objective(leaves, tokens, self.context)
            loss = out.token_loss_T.sum()
        grads: dict[str, Tensor | None] = {}
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            grads = dict(zip(wanted, found, strict=True))
        label, ids = grads.get("logprob_T"), grads.get("topk_logprob_TK")
        return out, RowGrads(
            label=torch.zeros_like(stats.label_logprob) if label is None else label,
            ids=torch.zeros_like(stats.id_logprobs) if ids is None else ids,
            entropy=grads.get("entropy_T"),
            divergence=grads.get("divergence_T"),
        )

    def _products(
        self,
        index: Tensor,
        hidden: Tensor,
        chunk: ChunkLogits,
        stats: RowStats,
        grads: RowGrads,
        gradients: Gradients,
    ) -> None:
        if self.drop_rows:
            active = grads.active().nonzero().squeeze(1)
            if len(active) <= _WORTH_MOVING * len(index):
                index, hidden = index[active], hidden[active]
                chunk, stats, grads = chunk.keep(active), stats.take(active), grads.take(active)
        if len(index) == 0:
            return
        grad = self.source.gradient_(chunk, stats, grads)
        if gradients.hidden is not None:
            gradients.hidden[index] = hidden_gradient(grad, self.source.weight)
        if gradients.weight is not None:
            add_weight_gradient(gradients.weight[: len(self.source.weight)], grad, hidden)
