"""Random inputs that look like training: logits of standard deviation 2.5, a teacher near the student, labels sampled
from the student, 15% of them moved into the teacher's top-k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.types import Region, TokenStreams


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of one configuration."""

    tokens: int
    hidden: int
    vocab: int
    """Columns on this rank: V / TP."""
    chunk: int
    top_k: int = 64
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs that every contender gets."""

    sizes: Sizes
    hidden: Tensor  # [N, H], a leaf
    weight: Tensor  # [v, H], a leaf
    tokens: TokenStreams

    def clear(self) -> None:
        """Clear the gradients."""
        self.hidden.grad = self.weight.grad = None


def make_inputs(sizes: Sizes, device: torch.device, seed: int = 0) -> Inputs:
    """Inputs for one shard of the vocabulary, as if it were the whole (a group of one rank)."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    hidden = normal(sizes.tokens, sizes.hidden).to(sizes.dtype)
    weight = (normal(sizes.vocab, sizes.hidden) * 2.5 / sizes.hidden**0.5).to(sizes.dtype)
    parts = [_label(rows, weight, sizes, generator) for rows in hidden.split(256)]
    label, teacher_logprob, ids, logprobs = (torch.cat(values) for values in zip(*parts, strict=True))
    count = sizes.tokens
    zeros = torch.zeros(count, dtype=torch.long, device=device)
    tokens = TokenStreams(
        label_T=label,
        region_T=torch.full((count,), int(Region.ON_POLICY), dtype=torch.uint8, device=device),
        sample_uid_T=zeros,
        label_position_T=torch.arange(count, device=device),
        uniform_T=torch.rand(count, generator=generator, device=device, dtype=torch.float64),
        rollout_logprob_T=torch.zeros(count, device=device),
        written_len_T=zeros + count,
        teacher_logprob_T=teacher_logprob,
        teacher_topk_ids_TK=ids,
        teacher_topk_logprob_TK=logprobs,
    )
    return Inputs(sizes=sizes, hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), tokens=tokens)


def _label(rows: Tensor, weight: Tensor, sizes: Sizes, generator: torch.Generator) -> tuple[Tensor, ...]:
    logits = rows.float() @ weight.float().t() if rows.device.type == "cpu" else (rows @ weight.t()).float()
    noise = torch.randn(logits.shape, generator=generator, device=rows.device)
    teacher = (logits + 0.7 * noise).log_softmax(1)
    gumbel = -torch.rand(logits.shape, generator=generator, device=rows.device).clamp_(min=1e-20).log_()
    label = (logits - gumbel.log()).argmax(1)
    values, ids = teacher.topk(sizes.top_k, dim=1)
    place = torch.randint(sizes.top_k, (len(rows), 1), generator=generator, device=rows.device)
    inside = torch.rand(len(rows), generator=generator, device=rows.device) < 0.15
    label = torch.where(inside, ids.gather(1, place)[:, 0], label)
    return label, teacher.gather(1, label[:, None])[:, 0], ids, values
