"""Divergences over the full vocabulary, from this rank's logits of the student (z) and of the teacher (y).

With p and q the two softmaxes, every sum over the ids with q > 0:

    forward_kl   sum q log(q / p)                                  d/dz_j = p_j - q_j
    reverse_kl   D = sum p log(p / q)                              d/dz_j = p_j (log(p_j / q_j) - D)
    jsd          b KL(q | m) + (1 - b) KL(p | m), m = b q + (1 - b) p
                 d/dz_j = p_j (g_j - sum_i g_i p_i)
                 g = -b (1 - b) q / m + (1 - b) (log(p / m) + 1 - (1 - b) p / m)     (GKD, arXiv 2306.13649)

An id that only the student has, or one to which the teacher gives -inf, has q = 0.  The reverse KL would be infinite
there; it is summed over the teacher's ids, of mass P under the student, and its gradient is then
p_j ([q_j > 0] (log(p_j / q_j) + 1) - D - P).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tropd.ops.rows import FLOOR, row_blocks, shifted
from megatron_tropd.ops.shard import VocabShard
from megatron_tropd.types import Divergence


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceSpec:
    """Which divergence; ``beta`` is the teacher's weight in the mixture of a jsd."""

    kind: Divergence
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.kind == "jsd" and not 0 < self.beta < 1:
            raise ValueError(
                f"jsd with beta {self.beta}: must be between 0 and 1; its limits are forward_kl (0) and reverse_kl (1)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceStats:
    """The divergence of C rows and the numbers that its gradient needs, reduced over the vocabulary, fp32."""

    value: Tensor  # [C]
    teacher_maximum: Tensor  # [C]
    teacher_log_sum: Tensor  # [C]
    offset: Tensor
    """[C]; forward_kl: unused zeros.  reverse_kl: D + P - 1.  jsd: sum g p."""


def pad_teacher(teacher: Tensor, width: int) -> Tensor:
    """Teacher logits [C, v_t] as wide as the student's, -inf where only the student has an id."""
    missing = width - teacher.shape[1]
    return F.pad(teacher, (0, missing), value=-torch.inf) if missing else teacher


def pair_sums(
    spec: DivergenceSpec, logits: Tensor, teacher: Tensor, maximum: Tensor, teacher_maximum: Tensor
) -> Tensor:
    """This rank's terms of the packed SUM, fp32 [n, C] (n is the same on all ranks); none for jsd."""
    out = torch.zeros(_NUM_SUMS[spec.kind], len(logits), dtype=torch.float32, device=logits.device)
    if not len(out) or logits.shape[1] == 0:
        return out
    for rows in row_blocks(logits):
        z = shifted(logits[rows], maximum[rows])
        y = shifted(pad_teacher(teacher[rows], logits.shape[1]), teacher_maximum[rows])
        if spec.kind == "forward_kl":
            out[0, rows] = torch.linalg.vecdot(y.exp(), y - z)
        else:
            exponentials = z.exp().mul_(y > FLOOR)
            out[0, rows] = torch.linalg.vecdot(exponentials, z - y)
            out[1, rows] = exponentials.sum(1)
    return out


_NUM_SUMS = {"forward_kl": 1, "reverse_kl": 2, "jsd": 0}


def finish(
    spec: DivergenceSpec,
    logits: Tensor,
    teacher: Tensor,
    sums: Tensor,
    student: tuple[Tensor, Tensor],
    teacher_rows: tuple[Tensor, Tensor],
    shard: VocabShard,
) -> DivergenceStats:
    """The divergence of every row; ``sums`` [n, C] are reduced, ``student`` and ``teacher_rows`` are (maximum, log sum)
    of the whole vocabulary.  One more SUM for jsd, whose terms need both softmaxes first."""
    log_sum, teacher_log_sum = student[1], teacher_rows[1]
    if spec.kind == "forward_kl":
        value = sums[0] / teacher_log_sum.exp() - teacher_log_sum + log_sum
        offset = torch.zeros_like(value)
    elif spec.kind == "reverse_kl":
        mass = sums[1] / log_sum.exp()
        value = sums[0] / log_sum.exp() + mass * (teacher_log_sum - log_sum)
        offset = value + mass - 1
    else:
        value, offset = shard.sum(_jsd_sums(spec.beta, logits, teacher, student, teacher_rows))
    return DivergenceStats(value=value, teacher_maximum=teacher_rows[0], teacher_log_sum=teacher_log_sum, offset=offset)


def _jsd_sums(
    beta: float, logits: Tensor, teacher: Tensor, student: tuple[Tensor, Tensor], teacher_rows: tuple[Tensor, Tensor]
) -> Tensor:
    """This rank's share of (jsd, sum g p), fp32 [2, C]."""
    out = torch.zeros(2, len(logits), dtype=torch.float32, device=logits.device)
    if logits.shape[1] == 0:
        return out
    for rows in row_blocks(logits):
        log_p = shifted(logits[rows], student[0][rows]) - student[1][rows, None]
        padded = pad_teacher(teacher[rows], logits.shape[1])
        log_q = shifted(padded, teacher_rows[0][rows]) - teacher_rows[1][rows, None]
        log_m = _log_mixture(beta, log_p, log_q)
        p = log_p.exp()
        value = beta * torch.linalg.vecdot(log_q.exp(), log_q - log_m)
        out[0, rows] = value + (1 - beta) * torch.linalg.vecdot(p, log_p - log_m)
        out[1, rows] = torch.linalg.vecdot(p, _jsd_slope(beta, log_p, log_q, log_m))
    return out


def _log_mixture(beta: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))


def _jsd_slope(beta: float, log_p: Tensor, log_q: Tensor, log_m: Tensor) -> Tensor:
    """g of the module's docstring."""
    rest = 1 - beta
    ratio_p, ratio_q = (log_p - log_m).exp(), (log_q - log_m).exp()
    return rest * (log_p - log_m + 1 - rest * ratio_p) - beta * rest * ratio_q


def gradient_term(spec: DivergenceSpec, stats: DivergenceStats, z: Tensor, log_sum: Tensor, teacher: Tensor) -> Tensor:
    """d divergence / d logits at columns whose shifted student logits are ``z`` [C, n] and whose teacher logits are
    ``teacher`` [C, n] (padded); fp32 [C, n]."""
    log_p = z - log_sum[:, None]
    y = shifted(teacher, stats.teacher_maximum)
    log_q = y - stats.teacher_log_sum[:, None]
    p = log_p.exp()
    if spec.kind == "forward_kl":
        return p - log_q.exp()
    if spec.kind == "reverse_kl":
        return p * (torch.where(y > FLOOR, log_p - log_q, -1.0) - stats.offset[:, None])
    slope = _jsd_slope(spec.beta, log_p, log_q, _log_mixture(spec.beta, log_p, log_q))
    return p * (slope - stats.offset[:, None])
