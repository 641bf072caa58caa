"""Section a: the head and its kernels against float64, at the real size of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.objectives.methods import make_objective
from megatron_tropd.objectives.settings import ObjectiveSettings
from megatron_tropd.ops.teacher_head import teacher_scores
from megatron_tropd.ops.vocab_parallel import HeadMode, HeadSettings, VocabShard, head_loss
from megatron_tropd.parallel import platform
from megatron_tropd.types import StepContext
from tools.head_benchmark.inputs import Inputs, Sizes, make_inputs

from . import kernel_numbers
from .device import one_rank
from .report import Report
from .setting import Setting
from .shapes import VOCAB
from .vocab_shards import on_shards

MODES: tuple[HeadMode, ...] = get_args(HeadMode)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARDS = (2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the head may be off by."""

    relative: float
    """Of the loss, relative to the sum of its terms' magnitudes, and of gradients, by their norms."""
    nats: float
    """Of a log-probability."""


LIMITS = {
    # Logits of up to 12 are rounded by half of 2^-20 in fp32.
    ("fp32", "fp32"): Limits(relative=2e-5, nats=1e-4),
    # bf16 logits between 8 and 16 are multiples of 2^-4: half of that is their error, and 1 + 2^-5 the factor by which
    # a probability may be wrong.  A label's own logit may be beyond 16.
    ("bf16", "bf16"): Limits(relative=2**-5, nats=0.07),
    ("bf16", "fp32"): Limits(relative=2**-7, nats=1e-4),
}
"""By dtype of the model and of its logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What a head gives: the loss, its gradients, and K1's log-probabilities."""

    loss: float
    scale: float
    """Sum of the magnitudes of the loss's terms."""
    logprob_T: Tensor
    hidden: Tensor
    weight: Tensor


def run(report: Report, setting: Setting) -> None:
    """See the module."""
    one_rank()
    real = Sizes(tokens=512, hidden=1024, vocab=VOCAB, chunk=200)
    sizes = Sizes(tokens=40, hidden=32, vocab=1003, chunk=7, top_k=8) if setting.tiny else real
    for name, dtype in DTYPES.items():
        with report.attempt(f"head in {name}"):
            _check_head(report, name, replace(sizes, dtype=dtype))
    with report.attempt("head, more than 2^31 logits"):
        _check_large(report, setting)
    kernel_numbers.run(report, setting)


def settled(inputs: Inputs) -> Inputs:
    """Return the inputs with the gate's coins a quarter of a nat or more from where they decide: rounding may not."""
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    tokens = inputs.tokens
    own_T = (hidden @ weight.t()).log_softmax(-1).gather(1, tokens.label_T[:, None])[:, 0]
    reward_T = tokens.teacher_logprob_T.double() - own_T
    rejected_T = (torch.arange(len(reward_T), device=reward_T.device) % 2 == 1) & (reward_T < -0.5)
    log_T = torch.where(rejected_T, reward_T / 2, reward_T.clamp(max=0.0) - 0.5)
    return replace(inputs, tokens=replace(tokens, uniform_T=log_T.exp()))


def by_definition(inputs: Inputs) -> Numbers:
    """Return TrOPD's numbers by its definition, in float64, by plain autograd over all logits."""
    hidden = inputs.hidden.detach().double().requires_grad_()
    weight = inputs.weight.detach().double().requires_grad_()
    tokens = inputs.tokens
    assert tokens.teacher_topk_ids_TK is not None and tokens.teacher_topk_logprob_TK is not None
    log_p = (hidden @ weight.t()).log_softmax(-1)
    own_T = log_p.gather(1, tokens.label_T[:, None])[:, 0]
    reward_T = tokens.teacher_logprob_T.double() - own_T.detach()
    log_q = tokens.teacher_topk_logprob_TK.double()
    divergence_T = (log_q.exp() * (log_q - log_p.gather(1, tokens.teacher_topk_ids_TK))).sum(1)
    policy_T = -reward_T * (own_T - own_T.detach()).exp()
    terms_T = torch.where(tokens.uniform_T.log() < reward_T, policy_T, divergence_T)
    terms_T.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Numbers(
        loss=float(terms_T.sum()), scale=float(terms_T.abs().sum()), logprob_T=own_T.detach(), hidden=hidden.grad,
        weight=weight.grad,
    )  # fmt: skip


def by_head(inputs: Inputs, shard: VocabShard, settings: HeadSettings, rows: slice) -> Numbers:
    """Return the product's numbers for the vocabulary rows ``rows``."""
    hidden = inputs.hidden.detach()[:, None].clone().requires_grad_()
    weight = inputs.weight.detach()[rows].clone().requires_grad_()
    out = head_loss(
        hidden, weight, inputs.tokens, shard, make_objective("tropd", ObjectiveSettings(top_k=inputs.sizes.top_k)),
        StepContext(), sequence_parallel=False, settings=settings,
    )  # fmt: skip
    out.loss.backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None
    return Numbers(
        loss=float(out.loss.detach()), scale=0.0, logprob_T=out.logprob_T, hidden=hidden.grad[:, 0],
        weight=weight.grad,
    )  # fmt: skip


def by_shards(inputs: Inputs, settings: HeadSettings, count: int) -> Numbers:
    """Return the numbers of the vocabulary in ``count`` shards, combined as tensor-parallel ranks combine them."""
    parts = on_shards(
        count, inputs.sizes.vocab, dist.group.WORLD, inputs.sizes.chunk,
        lambda shard: by_head(inputs, shard, settings, slice(shard.start, shard.start + shard.num_valid)),
    )  # fmt: skip
    return replace(
        parts[0],
        # Backward's all-reduce, in float64: each partial sum is rounded already.
        hidden=torch.stack([part.hidden.double() for part in parts]).sum(0),
        weight=torch.cat([part.weight for part in parts]),
    )


def _errors(ours: Numbers, exact: Numbers) -> tuple[float, float]:
    """Return (worst relative error of loss and gradients, worst error of a log-probability in nats); NaN stays NaN."""
    relative = [exact.hidden.new_tensor(abs(ours.loss - exact.loss) / exact.scale)]
    for mine, theirs in ((ours.hidden, exact.hidden), (ours.weight, exact.weight)):
        relative.append((mine.double() - theirs).norm() / theirs.norm())
    return float(torch.stack(relative).max()), float((ours.logprob_T.double() - exact.logprob_T).abs().max())


def _check_head(report: Report, name: str, sizes: Sizes) -> None:
    inputs = settled(make_inputs(sizes, platform.device(), seed=1))
    exact = by_definition(inputs)
    whole = VocabShard(
        vocab_size=sizes.vocab, rows_per_rank=sizes.vocab, group=dist.group.WORLD, chunk_tokens=sizes.chunk
    )
    size = f"{sizes.tokens} tokens, {sizes.vocab:,} ids"
    for logits in ("fp32", "bf16") if name == "bf16" else ("fp32",):
        limits = LIMITS[name, logits]
        for mode in MODES:
            what = f"{name} model, {logits} logits, {size}, {mode}, TP 1, 2 and 4"
            with report.attempt(what):
                settings = HeadSettings(mode=mode, logits_dtype=DTYPES[logits])
                found = [by_head(inputs, whole, settings, slice(None))]
                found += [by_shards(inputs, settings, count) for count in SHARDS]
                errors = [_errors(numbers, exact) for numbers in found]
                for place, (title, limit) in enumerate(
                    (
                        ("loss, hidden and weight gradient, relative", limits.relative),
                        ("K1's log-probabilities, nats", limits.nats),
                    )
                ):
                    each = [error[place] for error in errors]
                    said = ", ".join(f"{value:.1e}" for value in each)
                    # A NaN must not get lost, as it may in max().
                    worst = max(each) if all(value == value for value in each) else float("nan")
                    report.limit(f"{what}: {title}", worst, limit, reason=f"by TP: {said}")
    with report.attempt(f"{name}: a wrong label"):
        _check_control(report, name, inputs, whole, exact)
    with report.attempt(f"{name}: the teacher's head"):
        _check_teacher(report, f"{name} model, {size}", inputs, whole, LIMITS[name, name].nats)


def _check_control(report: Report, name: str, inputs: Inputs, shard: VocabShard, exact: Numbers) -> None:
    """Negative control: one label of all is another one, and the comparison has to notice it."""
    label_T, nats = inputs.tokens.label_T.clone(), LIMITS[name, name].nats
    label_T[0] = (label_T[0] + 1) % inputs.sizes.vocab
    wrong = replace(inputs, tokens=replace(inputs.tokens, label_T=label_T))
    _, found = _errors(by_head(wrong, shard, HeadSettings(), slice(None)), exact)
    report.add(
        f"{name} model: one wrong label is noticed", "pass" if found > nats else "failed",
        expected=f"above {nats:.1e} nats", measured=f"{found:.1e} nats", value=found,
    )  # fmt: skip


def _check_teacher(report: Report, title: str, inputs: Inputs, shard: VocabShard, nats: float) -> None:
    """The teacher's own head, on the same hidden states: log-probabilities and entropy."""
    hidden, weight, label_T = inputs.hidden.detach(), inputs.weight.detach(), inputs.tokens.label_T
    scores = teacher_scores(hidden, weight, label_T, shard, top_k=inputs.sizes.top_k, entropy=True)
    log_p = (hidden.double() @ weight.double().t()).log_softmax(-1)
    entropy_T = -(log_p.exp() * log_p).sum(-1)
    own_T = log_p.gather(1, label_T[:, None])[:, 0]
    assert scores.entropy is not None
    pairs = ((scores.logprob, own_T), (scores.entropy, entropy_T))
    worst = torch.stack([(ours.double() - theirs).abs().max() for ours, theirs in pairs]).max()  # NaN stays
    report.limit(f"{title}: the teacher's log-probabilities and entropies, nats", float(worst), nats)


def _check_large(report: Report, setting: Setting) -> None:
    """A chunk of more than 2^31 logits against chunks of fewer: products, gathers and scatters with 64-bit offsets."""
    large = Sizes(tokens=16384, hidden=64, vocab=VOCAB, chunk=2048, dtype=torch.bfloat16)
    sizes = replace(large, tokens=40, hidden=32, vocab=1003, chunk=7, top_k=8) if setting.tiny else large
    inputs = make_inputs(sizes, platform.device(), seed=2)
    shard = VocabShard(
        vocab_size=sizes.vocab, rows_per_rank=sizes.vocab, group=dist.group.WORLD, chunk_tokens=sizes.chunk
    )
    chunks, whole = (
        by_head(inputs, shard, HeadSettings(mode=mode), slice(None)) for mode in ("one-pass", "single-chunk")
    )
    nats = float((whole.logprob_T - chunks.logprob_T).abs().max())
    errors = [
        (ours.double() - theirs.double()).norm() / theirs.double().norm()
        for ours, theirs in ((whole.hidden, chunks.hidden), (whole.weight, chunks.weight))
    ]
    what = f"bf16, one chunk of {sizes.tokens:,} x {sizes.vocab:,} logits against chunks of {sizes.chunk}"
    report.limit(f"{what}: gradients, relative", float(torch.stack(errors).max()), 2**-6)
    # Products of other shapes may round one logit to the other of two neighbours, 2^-3 apart between 16 and 32.
    report.limit(f"{what}: K1's log-probabilities, nats", nats, 0.13)
