"""The implementations that the benchmark compares, from hidden states to a loss with gradients.

A contender is a function of :class:`Inputs` that returns a scalar whose backward fills ``hidden.grad`` and
``weight.grad``.  ``loss`` names the loss; REFERENCES computes each loss by its definition, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.objectives.methods import ObjectiveSettings, make_objective
from megatron_tropd.ops.vocab_parallel import HeadMode, HeadSettings, VocabShard, head_loss
from megatron_tropd.types import StepContext

from .inputs import Inputs


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the table."""

    name: str
    loss: str
    """A key of REFERENCES."""
    run: Callable[[Inputs], Tensor]
    whole_chunk: bool = False
    """Whether the contender holds the logits of all tokens by design, so that chunks do not bound its memory."""


def _trusted(inputs: Inputs, reward: Tensor) -> Tensor:
    return inputs.tokens.uniform_T.log() < reward.double()


def naive_tropd(inputs: Inputs) -> Tensor:
    """TrOPD on an fp32 log-softmax of all logits, by autograd."""
    tokens = inputs.tokens
    log_p = (inputs.hidden @ inputs.weight.t()).float().log_softmax(-1)
    return _tropd(inputs, log_p, tokens.teacher_topk_logprob_TK, tokens.teacher_logprob_T)


def _tropd(inputs: Inputs, log_p: Tensor, teacher_topk: Any, teacher: Tensor) -> Tensor:
    tokens = inputs.tokens
    assert tokens.teacher_topk_ids_TK is not None
    own = log_p.gather(1, tokens.label_T[:, None])[:, 0]
    reward = teacher - own.detach()
    trusted = _trusted(inputs, tokens.teacher_logprob_T - own.detach())
    divergence = (teacher_topk.exp() * (teacher_topk - log_p.gather(1, tokens.teacher_topk_ids_TK))).sum(1)
    return torch.where(trusted, -reward * (own - own.detach()).exp(), divergence).sum()


def _reference_logits(inputs: Inputs) -> Tensor:
    return (inputs.hidden @ inputs.weight.t()).log_softmax(-1)


def _reference_tropd(inputs: Inputs) -> Tensor:
    tokens = inputs.tokens
    assert tokens.teacher_topk_logprob_TK is not None
    topk, own = tokens.teacher_topk_logprob_TK.double(), tokens.teacher_logprob_T.double()
    return _tropd(inputs, _reference_logits(inputs), topk, own)


def _reference_nll(inputs: Inputs) -> Tensor:
    return -_reference_logits(inputs).gather(1, inputs.tokens.label_T[:, None]).sum()


def _reference_fkl(inputs: Inputs) -> Tensor:
    tokens = inputs.tokens
    assert tokens.teacher_topk_logprob_TK is not None and tokens.teacher_topk_ids_TK is not None
    log_q = tokens.teacher_topk_logprob_TK.double()
    return (log_q.exp() * (log_q - _reference_logits(inputs).gather(1, tokens.teacher_topk_ids_TK))).sum()


REFERENCES: dict[str, Callable[[Inputs], Tensor]] = {
    "TrOPD": _reference_tropd,
    "top-k FKL": _reference_fkl,
    "NLL": _reference_nll,
}
"""Each loss by its definition, for inputs whose hidden states and weights are float64."""


def three_products(inputs: Inputs) -> None:
    """The unit of time: the products for logits, hidden gradient and weight gradient, without a loss."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()
    logits @ weight
    logits.t() @ hidden


def ours(mode: HeadMode, logits_dtype: torch.dtype | None = None) -> Callable[[Inputs], Tensor]:
    """This package's head on its TrOPD objective."""

    def run(inputs: Inputs) -> Tensor:
        sizes = inputs.sizes
        shard = VocabShard(
            vocab_size=sizes.vocab, rows_per_rank=sizes.vocab, group=dist.group.WORLD, chunk_tokens=sizes.chunk
        )
        return head_loss(
            inputs.hidden[:, None],
            inputs.weight,
            inputs.tokens,
            shard,
            make_objective("tropd", ObjectiveSettings(top_k=sizes.top_k)),
            StepContext(),
            sequence_parallel=False,
            settings=HeadSettings(mode=mode, logits_dtype=logits_dtype),
        ).loss

    return run


OURS = (
    Contender(name="ours, one-pass", loss="TrOPD", run=ours("one-pass")),
    Contender(name="ours, one-pass, fp32 logits", loss="TrOPD", run=ours("one-pass", torch.float32)),
    Contender(name="ours, recompute", loss="TrOPD", run=ours("recompute")),
    Contender(name="ours, single chunk", loss="TrOPD", run=ours("single-chunk"), whole_chunk=True),
)
NAIVE = Contender(name="naive log-softmax", loss="TrOPD", run=naive_tropd, whole_chunk=True)
