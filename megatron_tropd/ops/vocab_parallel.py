"""The vocab-parallel head: hidden states in, numbers reduced over the vocabulary out.

The only file that sees logits.  They exist for one chunk of tokens at a time, forward and again
(recomputed) in backward; nothing of size [T, V] is kept.  The rows of the output table are split over
tensor-parallel ranks; rows at or beyond ``vocab_size`` are padding and are cut off BEFORE the product,
so that they have no logit, no probability and a gradient of exactly zero.

Per chunk two collectives: one MAX and one packed SUM of [sum exp, label logit, sum exp * shifted,
k gathered logits].  With z the logits, m their maximum, S = sum exp(z - m):

    lse = m + log S          log p_j = z_j - lse          H = log S - (sum exp(z - m) (z - m)) / S

and for upstream gradients g_x (label), g_v (the k ids), g_H (entropy)

    dL/dz_j = g_x [j = x] + sum_v g_v [j = v] - (g_x + sum_v g_v) p_j - g_H p_j (log p_j + H)

Backward needs no collective for the logits; the caller's gradient of ``hidden`` is a partial sum that
Megatron's region operators reduce (see :func:`gather_hidden`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_tropd.objectives.base import Objective, Regions
from megatron_tropd.types import Metric, Region, StepContext, TeacherScores, TokenStats, TokenStreams


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabShard:
    """Which ids this rank's rows of the output table stand for."""

    vocab_size: int
    """Ids that exist: the rows of the HF checkpoint."""
    rows_per_rank: int
    group: Any
    """Tensor-parallel process group."""
    chunk_tokens: int = 1024
    """Tokens whose logits exist at one time; V / tp * 4 bytes each."""

    @property
    def start(self) -> int:
        """First id of this rank."""
        return dist.get_rank(self.group) * self.rows_per_rank

    @property
    def num_valid(self) -> int:
        """Rows of this rank that are not padding; may be 0."""
        return max(0, min(self.rows_per_rank, self.vocab_size - self.start))

    def sum(self, value: Tensor) -> Tensor:
        """SUM over the group, in place."""
        dist.all_reduce(value, group=self.group)
        return value

    def max(self, value: Tensor) -> Tensor:
        """MAX over the group, in place."""
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class _ChunkStats:
    """Reduced numbers of one chunk of C tokens, fp32."""

    lse: Tensor  # [C]
    label_logprob: Tensor  # [C]
    id_logprobs: Tensor  # [C, K]
    entropy: Tensor  # [C]


def _logits(hidden: Tensor, weight: Tensor, shard: VocabShard) -> Tensor:
    """[C, num_valid] fp32; the product itself runs in the model's dtype."""
    return (hidden @ weight[: shard.num_valid].t()).float()


def _gather(logits: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """This rank's logits at global ``ids`` [C, K]; 0 where another rank owns the id."""
    if shard.num_valid == 0:
        return torch.zeros_like(ids, dtype=logits.dtype)
    local = ids - shard.start
    mine = (local >= 0) & (local < shard.num_valid)
    return logits.gather(1, local.clamp(0, shard.num_valid - 1)) * mine


def _chunk_stats(logits: Tensor, labels: Tensor, ids: Tensor, shard: VocabShard) -> _ChunkStats:
    nothing = logits.new_full((len(logits),), -torch.inf)  # a shard of padding alone has no maximum
    maximum = shard.max(logits.amax(1) if shard.num_valid else nothing)
    shifted = logits - maximum[:, None]
    exponentials = shifted.exp()
    partial = [exponentials.sum(1, keepdim=True), (exponentials * shifted).sum(1, keepdim=True)]
    packed = shard.sum(torch.cat([*partial, _gather(shifted, torch.cat([labels[:, None], ids], 1), shard)], 1))
    log_sum = packed[:, 0].log()
    logprobs = packed[:, 2:] - log_sum[:, None]
    return _ChunkStats(
        lse=maximum + log_sum,
        label_logprob=logprobs[:, 0],
        id_logprobs=logprobs[:, 1:],
        entropy=log_sum - packed[:, 1] / packed[:, 0],
    )


class _TokenStats(torch.autograd.Function):
    """(hidden [N, H], weight [rows, H]) -> label log-probability [N], id log-probabilities [N, K],
    entropy [N]; see the module's docstring for the equations."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        parts = [
            _chunk_stats(_logits(rows, weight, shard), rows_labels, rows_ids, shard)
            for rows, rows_labels, rows_ids in _chunks(shard.chunk_tokens, hidden, labels, ids)
        ]
        lse, entropy = torch.cat([p.lse for p in parts]), torch.cat([p.entropy for p in parts])
        ctx.save_for_backward(hidden, weight, labels, ids, lse, entropy)
        ctx.shard = shard
        return torch.cat([p.label_logprob for p in parts]), torch.cat([p.id_logprobs for p in parts]), entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_label, grad_ids, grad_entropy = grads
        hidden, weight, labels, ids, lse, entropy = ctx.saved_tensors
        shard: VocabShard = ctx.shard
        valid = weight[: shard.num_valid]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        chunks = _chunks(shard.chunk_tokens, hidden, labels, ids, lse, entropy, grad_label, grad_ids, grad_entropy)
        start = 0
        for rows, x, v, rows_lse, rows_entropy, g_x, g_v, g_h in chunks:
            logprob = _logits(rows, weight, shard) - rows_lse[:, None]
            all_ids, all_grads = torch.cat([x[:, None], v], 1), torch.cat([g_x[:, None], g_v], 1)
            grad = logprob.exp() * (-all_grads.sum(1, keepdim=True) - g_h[:, None] * (logprob + rows_entropy[:, None]))
            _scatter_add(grad, all_ids, all_grads, shard)
            grad = grad.to(hidden.dtype)
            grad_hidden[start : start + len(rows)] = grad @ valid
            grad_weight[: shard.num_valid] += (grad.t() @ rows).float()
            start += len(rows)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _scatter_add(grad: Tensor, ids: Tensor, values: Tensor, shard: VocabShard) -> None:
    """Add ``values`` [C, K] to columns ``ids`` of ``grad`` where this rank owns them.  An id may repeat
    in a row (the sampled token is usually in the teacher's top-k): scatter_add adds both."""
    if shard.num_valid == 0:
        return
    local = ids - shard.start
    mine = (local >= 0) & (local < shard.num_valid)
    grad.scatter_add_(1, local.clamp(0, shard.num_valid - 1), values * mine)


def _chunks(size: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The same row ranges of every tensor; one empty chunk when there are no rows."""
    return list(zip(*(tensor.split(size) for tensor in tensors), strict=True))


def _response_rows(tokens: TokenStreams) -> Tensor:
    """Packed positions whose label some loss may read; prompts and padding never reach the head."""
    region = tokens.region_T
    return ((region == Region.GUIDANCE) | (region == Region.ON_POLICY)).nonzero().squeeze(1)


def gather_hidden(hidden: Tensor, shard: VocabShard, *, sequence_parallel: bool) -> Tensor:
    """The last stage's output for all tokens of the micro-batch, [T, 1, H], differentiable.

    The head's gradient of it is this rank's partial sum; backward adds the ranks (all-reduce, or
    reduce-scatter under sequence parallelism, where ``hidden`` is [T / tp, 1, H]).
    """
    if sequence_parallel:
        return gather_from_sequence_parallel_region(hidden, group=shard.group)
    return copy_to_tensor_model_parallel_region(hidden, group=shard.group)


def student_token_stats(
    hidden: Tensor, weight: Tensor, tokens: TokenStreams, shard: VocabShard, *, sequence_parallel: bool
) -> TokenStats:
    """The student at every position of the micro-batch; 0 where its label is in no loss.

    Args:
        hidden: output of the last stage, [T, 1, H], or [T / tp, 1, H] under sequence parallelism.
        weight: this rank's rows of the output table, [V_padded / tp, H].
    """
    hidden = gather_hidden(hidden, shard, sequence_parallel=sequence_parallel)
    rows = _response_rows(tokens)
    ids = tokens.teacher_topk_ids_TK
    ids = ids[rows] if ids is not None else tokens.label_T.new_zeros(len(rows), 0)
    label, topk, entropy = _TokenStats.apply(hidden.squeeze(1)[rows], weight, tokens.label_T[rows], ids, shard)
    num_tokens = len(tokens.label_T)

    def spread(value: Tensor) -> Tensor:
        return value.new_zeros(num_tokens, *value.shape[1:]).index_copy(0, rows, value)

    return TokenStats(
        logprob_T=spread(label),
        topk_logprob_TK=spread(topk) if tokens.teacher_topk_ids_TK is not None else None,
        entropy_T=spread(entropy),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadOutput:
    """Loss of a micro-batch, with everything its labels add to the step's sums."""

    loss: Tensor  # fp32 scalar: sum of token losses; carries grad
    denominator: Tensor  # int64 scalar, what the global sum is divided by, summed over the step
    metrics: dict[str, Metric]
    logprob_T: Tensor  # fp32, detached; the student at every label, 0 where the label is in no loss


def head_loss(
    hidden: Tensor, weight: Tensor, tokens: TokenStreams, shard: VocabShard, objective: Objective, context: StepContext,
    *, sequence_parallel: bool,
) -> HeadOutput:  # fmt: skip
    """``objective`` over all labels of a micro-batch, from hidden states (see :func:`student_token_stats`)."""
    stats = student_token_stats(hidden, weight, tokens, shard, sequence_parallel=sequence_parallel)
    out = objective(stats, tokens, context)
    denominator = out.denominator if out.denominator is not None else Regions.of(tokens).num_tokens
    return HeadOutput(
        loss=out.token_loss_T.sum(),
        denominator=denominator,
        metrics=out.metrics,
        logprob_T=stats.logprob_T.detach(),
    )


def _sort_keys(logits: Tensor, shard: VocabShard) -> Tensor:
    """One int64 per logit that sorts by (value descending, id ascending).  Without the id, ties (common
    in bf16) are broken by position and the chosen ids depend on TP."""
    bits = logits.contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    ids = torch.arange(shard.start, shard.start + shard.num_valid, device=logits.device)
    return (ordered << 31) + (0x7FFFFFFF - ids)


def _split_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(ids int64, logits fp32) of sort keys; the inverse of :func:`_sort_keys`."""
    ids = 0x7FFFFFFF - (keys & 0x7FFFFFFF)
    ordered = (keys >> 31).int()
    return ids, torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)


def _exact_topk(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Global top-k: every global winner is among its shard's local top-k.  (ids, logits) [C, k]."""
    local_k = min(k, shard.num_valid)
    keys = logits.new_full((len(logits), k), torch.iinfo(torch.int64).min, dtype=torch.int64)
    if local_k:
        keys[:, :local_k] = _sort_keys(logits, shard).topk(local_k, dim=1).values
    gathered = [torch.empty_like(keys) for _ in range(dist.get_world_size(shard.group))]
    dist.all_gather(gathered, keys, group=shard.group)
    return _split_keys(torch.cat(gathered, 1).topk(k, dim=1).values)


@torch.no_grad()
def teacher_scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, shard: VocabShard, *, top_k: int, entropy: bool
) -> TeacherScores:
    """Log-probability of ``labels`` [N], exact top-k and full-vocabulary entropy of frozen logits.

    ``hidden`` is [N, H]; the result is the same on every rank of the group.  A label beyond the
    vocabulary (a row only the student has) has log-probability -inf.

    Raises:
        ValueError: ``top_k`` exceeds the vocabulary.
    """
    if top_k > shard.vocab_size:
        raise ValueError(f"--top-k {top_k} is larger than the vocabulary of {shard.vocab_size}")
    parts: list[tuple[_ChunkStats, Tensor, Tensor]] = []
    for rows, rows_labels in _chunks(shard.chunk_tokens, hidden, labels):
        logits = _logits(rows, weight, shard)
        stats = _chunk_stats(logits, rows_labels, rows_labels.new_zeros(len(rows), 0), shard)
        ids, values = _exact_topk(logits, top_k, shard) if top_k else (rows_labels[:, None][:, :0],) * 2
        parts.append((stats, ids, values - stats.lse[:, None]))
    return TeacherScores(
        logprob=torch.cat([stats.label_logprob for stats, _, _ in parts]).masked_fill(
            labels >= shard.vocab_size, -torch.inf
        ),
        topk_ids=torch.cat([ids for _, ids, _ in parts]).int() if top_k else None,
        topk_logprobs=torch.cat([values for _, _, values in parts]) if top_k else None,
        entropy=torch.cat([stats.entropy for stats, _, _ in parts]) if entropy else None,
    )
