"""Section c: attention over packed sequences of uneven lengths, in each of the product's ways, against float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_tropd.models.architecture import Architecture
from megatron_tropd.parallel import platform

from .attention_kinds import KINDS, Attention, attention, unavailable
from .device import milliseconds, peak_gb
from .report import Report
from .setting import Setting
from .shapes import QWEN3_1_7B, TINY

LENGTHS = (7919, 4001, 2053, 1031, 523, 257, 131, 469)
"""16,384 tokens, none of the lengths a multiple of a kernel's block."""
TINY_LENGTHS = (19, 11, 1, 9)
LIMITS = {torch.bfloat16: 2**-6, torch.float32: 1e-5}
"""Relative error: flash attention rounds probabilities to bf16 too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Queries, keys, values and the gradient of the output."""

    query: Tensor  # [T, heads, head_dim]
    key: Tensor  # [T, groups, head_dim]
    value: Tensor  # [T, groups, head_dim]
    upstream: Tensor  # [T, heads * head_dim]

    @classmethod
    def make(cls, arch: Architecture, tokens: int, dtype: torch.dtype) -> Inputs:
        """Return random ones."""
        device = platform.device()
        generator = torch.Generator(device=device).manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        heads, groups, dim = arch.num_attention_heads, arch.num_query_groups, arch.head_dim
        return cls(
            query=normal(tokens, heads, dim).requires_grad_(), key=normal(tokens, groups, dim).requires_grad_(),
            value=normal(tokens, groups, dim).requires_grad_(), upstream=normal(tokens, heads * dim),
        )  # fmt: skip

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What has a gradient."""
        return self.query, self.key, self.value


def run(report: Report, setting: Setting) -> None:
    """See the module."""
    lengths, arch = (TINY_LENGTHS, TINY) if setting.tiny else (LENGTHS, QWEN3_1_7B)
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    inputs = Inputs.make(arch, sum(lengths), dtype)
    exact = by_definition(inputs, lengths)
    for kind in KINDS:
        if why := unavailable(kind, dtype, arch.head_dim):
            report.not_run(kind, why)
            continue
        with report.attempt(kind):
            _check(report, kind, inputs, exact, _ready(kind, lengths), lengths)


def _ready(kind: str, lengths: Sequence[int]) -> Attention:
    bounds = torch.tensor([0, *lengths], device=platform.device()).cumsum(0).to(torch.int32)
    sequences = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )  # fmt: skip
    return attention(kind, sequences)


def by_definition(inputs: Inputs, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Return output and gradients in float64, one sequence and one key/value head at a time."""
    heads, groups, dim = inputs.query.shape[1], inputs.key.shape[1], inputs.query.shape[2]
    upstream = inputs.upstream.view(-1, heads, dim)
    found = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in (upstream, *inputs.leaves)]
    output, *gradients = found
    start = 0
    for length in lengths:
        rows = slice(start, start := start + length)
        future = torch.ones(length, length, dtype=torch.bool, device=upstream.device).triu(1)
        for group in range(groups):
            mine = slice(group * heads // groups, (group + 1) * heads // groups)
            parts = (
                inputs.query[rows, mine],
                inputs.key[rows, group : group + 1],
                inputs.value[rows, group : group + 1],
            )
            query, key, value = (part.detach().double().transpose(0, 1).requires_grad_() for part in parts)
            scores = (query @ key.transpose(1, 2) / dim**0.5).masked_fill(future, -torch.inf)
            context = scores.softmax(-1) @ value  # [heads of the group, length, dim]
            context.backward(upstream[rows, mine].double().transpose(0, 1))
            output[rows, mine] = context.detach().transpose(0, 1)
            for target, leaf, columns in zip(
                gradients, (query, key, value), (mine, *[slice(group, group + 1)] * 2), strict=True
            ):
                assert leaf.grad is not None
                target[rows, columns] = leaf.grad.transpose(0, 1)
    return output.flatten(1), *gradients


def _pass(inputs: Inputs, attend: Attention) -> Tensor:
    for leaf in inputs.leaves:
        leaf.grad = None
    output = attend(*inputs.leaves)
    output.backward(inputs.upstream.view_as(output))
    return output.detach()


def _check(
    report: Report, kind: str, inputs: Inputs, exact: Sequence[Tensor], attend: Attention, lengths: Sequence[int]
) -> None:
    tokens = len(inputs.query)
    what = f"{kind}, {tokens:,} tokens in {len(lengths)} sequences, the longest {max(lengths):,}"
    output = _pass(inputs, attend)
    ours = (output.reshape(tokens, -1), *(leaf.grad for leaf in inputs.leaves))
    errors = [
        (mine.double() - theirs).norm() / theirs.norm()
        for mine, theirs in zip(ours, exact, strict=True)
        if mine is not None
    ]
    said = ", ".join(f"{float(error):.1e}" for error in errors)
    report.limit(
        f"{what}: values and gradients, relative", float(torch.stack(errors).max()), LIMITS[inputs.query.dtype],
        reason=f"values, queries, keys, values' gradients: {said}",
    )  # fmt: skip
    taken = milliseconds(lambda: _pass(inputs, attend), warmup=1, repeats=5)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    flops = 3 * 4 * inputs.query.shape[1] * inputs.query.shape[2] * pairs
    report.measured(f"{what}: forward and backward", taken, unit=" ms", reason=f"{flops / taken / 1e9:,.1f} TFLOP/s")
    before = torch.cuda.memory_allocated() / 1e9 if platform.is_cuda() else 0.0
    _, peak = peak_gb(lambda: _pass(inputs, attend))
    if peak is None:
        report.not_run(f"{what}: memory", "there is no GPU memory to measure on a CPU")
    else:
        report.measured(f"{what}: memory beyond inputs and their gradients", peak - before, form=",.3f", unit=" GB")
