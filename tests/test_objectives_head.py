"""Every method through the vocab-parallel head: loss, gradients per shard, denominator and metrics at TP 1, 2 and 4."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_tropd.objectives.methods import METHODS, ObjectiveSettings, make_objective
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import StepContext
from tests.dense import dense_stats, random_batch
from tests.oracle import oracle

TOKENS, VOCAB, TOP_K, HIDDEN = 96, 67, 5, 16
CONTEXT = StepContext(step=40, num_steps=200, entropy_threshold=1.5)
NUMBERS = {"guidance_beta": 0.3}
CALLS = [
    (method, mode, sequence_parallel, several_updates)
    for method in METHODS
    for mode, sequence_parallel, several_updates in [("one-pass", False, False), ("recompute", True, True)]
]


def _inputs(several_updates):
    """fp32 hidden states and output tables of student and teacher, and streams that fit them."""
    generator = torch.Generator().manual_seed(5)
    hidden, teacher_hidden = (torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(2))
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    teacher_hidden = 0.8 * hidden + 0.4 * teacher_hidden
    teacher = weight + 0.3 * torch.randn(VOCAB, HIDDEN, generator=generator)
    logits = hidden.double() @ weight.double().t(), teacher_hidden.double() @ teacher.double().t()
    _, _, tokens = random_batch(
        num_tokens=TOKENS, vocab_size=VOCAB, top_k=TOP_K, seed=7, models=logits, several_updates=several_updates
    )
    half = {
        name: value.float()
        for name in tokens.__dataclass_fields__
        if (value := getattr(tokens, name)) is not None and value.is_floating_point() and name != "uniform_T"
    }
    return hidden, weight, teacher, replace(tokens, teacher_hidden_TH=teacher_hidden, **half), logits[1]


def _heads(tp):
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    return [_head(groups, *call) for call in CALLS]


def _head(groups, method, mode, sequence_parallel, several_updates):
    from megatron_tropd.ops.vocab_parallel import HeadSettings, VocabShard, head_loss

    tp, rank = groups.layout.tp, groups.coords.tp
    hidden, weight, teacher, tokens, _ = _inputs(several_updates)
    rows = replace(groups.layout, make_vocab_size_divisible_by=8).padded_vocab_size(VOCAB) // tp
    padded = torch.cat([weight, torch.full((rows * tp - VOCAB, HIDDEN), 50.0)])
    mine = padded[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    sequence_parallel = sequence_parallel and tp > 1
    local = (hidden.chunk(tp)[rank] if sequence_parallel else hidden)[:, None].clone().requires_grad_()
    out = head_loss(
        local, mine, tokens,
        VocabShard(vocab_size=VOCAB, rows_per_rank=rows, group=groups.pg_collection.tp, chunk_tokens=13),
        make_objective(method, ObjectiveSettings(top_k=TOP_K, **NUMBERS)), CONTEXT,
        sequence_parallel=sequence_parallel, settings=HeadSettings(mode=mode),
        teacher_weight=teacher[rank * rows : (rank + 1) * rows],
    )  # fmt: skip
    out.loss.backward()
    metrics = {name: (float(metric.total), float(metric.count)) for name, metric in out.metrics.items()}
    hidden_grad = local.grad[:, 0]
    return float(out.loss), int(out.denominator), hidden_grad, mine.grad, metrics, sequence_parallel


@cache
def _expected(method, several_updates):
    """(token losses, gradient of hidden states, of the output table, denominator, metrics), dense in float64."""
    hidden, weight, _, tokens, teacher_logits = _inputs(several_updates)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = hidden @ weight.t()
    losses, denominator = oracle(method, logits, teacher_logits, tokens, CONTEXT, **NUMBERS)
    losses.sum().backward()
    objective = make_objective(method, ObjectiveSettings(top_k=TOP_K, **NUMBERS))
    stats = dense_stats(logits.detach(), teacher_logits, tokens, replace(objective.needs, top_k=TOP_K))
    metrics = objective(stats, tokens, CONTEXT).metrics
    sums = {name: (float(metric.total), float(metric.count)) for name, metric in metrics.items()}
    return losses.detach(), hidden.grad, weight.grad, denominator, sums


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_method_equals_its_oracle_and_reports_the_same_in_every_layout(ranks, tp, measured):
    by_rank = ranks(tp).run(_heads, tp)
    claim = f"all {len(METHODS)} methods through the head: loss and per-shard gradients, TP {tp} (relative)"
    for index, (method, mode, _, several_updates) in enumerate(CALLS):
        results = [rank[index] for rank in by_rank]
        losses, exact_hidden, exact_weight, denominator, sums = _expected(method, several_updates)
        grad_hidden = torch.cat([r[2] for r in results]) if results[0][5] else results[0][2]
        grad_weight = torch.cat([r[3] for r in results])
        assert torch.count_nonzero(grad_weight[VOCAB:]) == 0, "padding rows received a gradient"
        errors = [abs(r[0] - float(losses.sum())) / float(losses.abs().sum()) for r in results]
        for ours, exact in ((grad_hidden, exact_hidden), (grad_weight[:VOCAB], exact_weight)):
            errors.append(float((ours.double() - exact).norm() / exact.norm()))
        assert max(errors) <= 2e-6, (method, mode, errors)
        measured(claim, max(errors), 2e-6)
        for _, counted, _, _, metrics, _ in results:
            assert counted == denominator, (method, mode)
            assert set(metrics) == set(sums), (method, mode)
            for name, pair in metrics.items():
                assert pair == pytest.approx(sums[name], rel=1e-5, abs=1e-4), (method, mode, name)
