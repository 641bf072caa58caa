"""The head against dense float64 autograd: loss and per-shard gradients at TP 1, 2, 4, in every mode."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import StepContext
from tests.dense import make_streams
from tests.head_methods import HEAD_METHODS, STUDENT_ONLY

HIDDEN, TEACHER_HIDDEN = 16, 12
MODES = ("one-pass", "recompute", "single-chunk")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the head; the same inputs are made on every rank and by the oracle."""

    method: str
    mode: str = "one-pass"
    vocab: int = 56
    tokens: int = 24
    top_k: int = 4
    chunk: int = 7
    scale: float = 3.0
    sequence_parallel: bool = False
    regions: tuple[int, ...] | None = None
    twins: bool = False
    """Every row of the output table occurs five times or so: ties everywhere."""
    dtype: torch.dtype = torch.float32
    logits_dtype: torch.dtype | None = None

    def inputs(self):
        """(hidden [T, H], weight [V, H], streams, teacher weight [V - 3, H_t])."""
        generator = torch.Generator().manual_seed(self.vocab + self.tokens)
        hidden = torch.randn(self.tokens, HIDDEN, generator=generator)
        weight = torch.randn(self.vocab, HIDDEN, generator=generator) * self.scale / HIDDEN**0.5
        if self.twins:
            weight = weight[torch.arange(self.vocab) % (self.vocab // 5 + 1)]
        regions = list(self.regions) if self.regions else None
        streams, _ = make_streams(
            num_tokens=self.tokens, vocab_size=self.vocab, top_k=self.top_k, seed=3, regions=regions
        )
        if streams.teacher_topk_ids_TK is not None:  # every third label is a duplicate of an id of the top-k
            sampled = torch.where(
                torch.arange(self.tokens) % 3 == 0, streams.teacher_topk_ids_TK[:, -1], streams.label_T
            )
            streams = replace(streams, label_T=sampled)
        teacher_hidden = torch.randn(self.tokens, TEACHER_HIDDEN, generator=generator).to(self.dtype)
        teacher = torch.randn(self.vocab - STUDENT_ONLY, TEACHER_HIDDEN, generator=generator) * 2 / TEACHER_HIDDEN**0.5
        streams = replace(streams, teacher_hidden_TH=teacher_hidden)
        return hidden.to(self.dtype), weight.to(self.dtype), streams, teacher.to(self.dtype)


def _heads(tp, cases):
    """One call per case, all in one set of process groups (making gloo groups is what costs)."""
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    return [_head(groups, case) for case in cases]


def _head(groups, case):
    """On one rank: (loss, denominator, hidden gradient, gradient of this rank's rows), all from the package."""
    from megatron_tropd.ops.vocab_parallel import HeadSettings, VocabShard, head_loss

    tp, rank = groups.layout.tp, groups.coords.tp
    hidden, weight, streams, teacher = case.inputs()
    rows = replace(groups.layout, make_vocab_size_divisible_by=8).padded_vocab_size(case.vocab) // tp
    # Poisoned padding: a head that reads it is wrong by a mile.
    padded = torch.cat([weight, torch.full((rows * tp - case.vocab, HIDDEN), 50.0, dtype=case.dtype)])
    mine = padded[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    local = hidden.chunk(tp)[rank] if case.sequence_parallel else hidden
    local = local[:, None].clone().requires_grad_()
    shard = VocabShard(
        vocab_size=case.vocab, rows_per_rank=rows, group=groups.pg_collection.tp, chunk_tokens=case.chunk
    )
    out = head_loss(
        local,
        mine,
        streams,
        shard,
        HEAD_METHODS[case.method].make(case.top_k),
        StepContext(),
        sequence_parallel=case.sequence_parallel,
        settings=HeadSettings(mode=case.mode, logits_dtype=case.logits_dtype),
        teacher_weight=teacher[rank * rows : (rank + 1) * rows],
    )
    assert local.grad is None and mine.grad is None, "gradients before backward"
    (out.loss * 0.5).backward()  # not one: the upstream factor is part of the contract
    return out.loss.item(), int(out.denominator), 2 * local.grad[:, 0], 2 * mine.grad


def _error(case, results):
    hidden, weight, streams, teacher = case.inputs()
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    teacher_logits = streams.teacher_hidden_TH.double() @ teacher.double().t()
    losses = HEAD_METHODS[case.method].oracle(hidden @ weight.t(), streams, teacher_logits)
    if losses.requires_grad:
        losses.sum().backward()
    grad_weight = torch.cat([r[3] for r in results])
    if case.sequence_parallel:
        grad_hidden = torch.cat([r[2] for r in results])
    else:
        grad_hidden = results[0][2]
        assert all(torch.equal(grad_hidden, r[2]) for r in results)
    assert torch.count_nonzero(grad_weight[case.vocab :]) == 0, "padding rows received a gradient"
    # Relative to the terms of the sum: K1 rewards have both signs and cancel.
    errors = [abs(r[0] - losses.sum().item()) / max(losses.abs().sum().item(), 1e-12) for r in results]
    for ours, oracle in ((grad_hidden, hidden.grad), (grad_weight[: case.vocab], weight.grad)):
        oracle = torch.zeros_like(ours) if oracle is None else oracle
        errors.append(float((ours.double() - oracle).norm() / oracle.norm().clamp(min=1e-9)))
    return max(errors)


def _cases(method, tp):
    """Fixed corners, then random draws, spread over the modes."""
    corners = [
        {"vocab": 7, "tokens": 1, "top_k": 1, "chunk": 10, "regions": (3,)},
        {"vocab": 56, "tokens": 24, "chunk": 1, "twins": True},
        {"vocab": 131, "tokens": 40, "top_k": 64, "chunk": 7, "scale": 2.0},
        {"vocab": 1031, "tokens": 200, "top_k": 16, "chunk": 64, "scale": 20.0},  # logits of +-80
        {"vocab": 9, "tokens": 16, "top_k": 9, "chunk": 5},  # at TP 4 the last shard (rows 12..15) is padding alone
    ]
    cases = [
        Case(method=method, mode=mode, sequence_parallel=sequence_parallel and corner["tokens"] % tp == 0, **corner)
        for corner in corners
        for mode in MODES
        for sequence_parallel in ([False, True] if mode == "one-pass" else [mode == "recompute"])
        if tp > 1 or not sequence_parallel
    ]
    draw = random.Random(f"{method} {tp}")
    for _ in range(12):
        # Not fewer: the reward log q - log p of a lone token may be the small difference of two large numbers.
        tokens = draw.choice([32, 33, 64, 120])
        vocab = draw.randint(7, 1031)
        cases.append(
            Case(
                method=method,
                mode=draw.choice(MODES),
                vocab=vocab,
                tokens=tokens,
                top_k=draw.randint(1, min(64, vocab)),
                chunk=draw.choice([1, 7, 1000] if tokens < 40 else [7, 50, 1000]),
                scale=draw.choice([0.1, 1.0, 3.0, 20.0]),
                sequence_parallel=tp > 1 and tokens % tp == 0 and draw.random() < 0.5,
                regions=tuple(draw.choices([0, 1, 2, 3, 3, 3, 4], k=tokens)),
                twins=draw.random() < 0.2,
            )
        )
    return cases


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loss_and_gradients_equal_dense_autograd(ranks, tp, measured):
    cases = [case for method in HEAD_METHODS for case in _cases(method, tp)]
    by_rank = ranks(tp).run(_heads, tp, cases)
    for index, case in enumerate(cases):
        loud = case.scale == 20.0
        claim = f"{case.method}: loss and per-shard gradients equal dense float64 autograd, TP {tp} (relative)"
        limit = HEAD_METHODS[case.method].limit_at_80 if loud else 2e-6
        measured(claim + ", logits of +-80" * loud, _error(case, [results[index] for results in by_rank]), limit)


@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["bf16-logits", "fp32-logits"])
def test_bf16_gradients_are_within_its_rounding(ranks, measured, logits_dtype):
    cases = [
        Case(method=method, mode=mode, vocab=331, tokens=64, chunk=20, scale=1.0, dtype=torch.bfloat16,
             logits_dtype=logits_dtype)
        for method in HEAD_METHODS for mode in MODES
    ]  # fmt: skip
    by_rank = ranks(2).run(_heads, 2, cases)
    name = "bf16" if logits_dtype is None else "fp32"
    for index, case in enumerate(cases):
        error = _error(case, [results[index] for results in by_rank])
        measured(f"bf16 model, {name} logits: loss and gradients, every method, TP 2 (relative)", error, 2**-7)


def test_a_wrong_label_is_noticed(ranks):
    """Negative control of the oracle."""
    case = Case(method="tropd")
    results = [r[0] for r in ranks(2).run(_heads, 2, [case])]
    assert _error(case, results) < 2e-6
    assert _error(replace(case, regions=(3,) * case.tokens), results) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_no_response_token_gives_zero_loss_and_zero_gradients(ranks, mode):
    case = Case(method="tropd", mode=mode, tokens=8, regions=(0, 1) * 4)
    for ((loss, denominator, grad_hidden, grad_weight),) in ranks(2).run(_heads, 2, [case]):
        assert loss == 0.0 and denominator == 0
        assert torch.count_nonzero(grad_hidden) == 0 and torch.count_nonzero(grad_weight) == 0


def _outputs(tp, mode, chunk):
    from megatron_tropd.ops.vocab_parallel import HeadSettings, VocabShard, head_loss
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    case = Case(method="tropd", tokens=40, vocab=61, top_k=9)
    hidden, weight, streams, _ = case.inputs()
    rows = replace(groups.layout, make_vocab_size_divisible_by=8).padded_vocab_size(61) // tp
    padded = torch.cat([weight, torch.full((rows * tp - 61, HIDDEN), 50.0)])
    shard = VocabShard(vocab_size=61, rows_per_rank=rows, group=groups.pg_collection.tp, chunk_tokens=chunk)
    with torch.no_grad():
        out = head_loss(
            hidden[:, None], padded.chunk(tp)[groups.coords.tp], streams, shard, HEAD_METHODS["tropd"].make(9),
            StepContext(), sequence_parallel=False, settings=HeadSettings(mode=mode, topk_overlap=True),
        )  # fmt: skip
    assert not out.loss.requires_grad
    metrics = {name: (float(m.total), float(m.count)) for name, m in out.metrics.items()}
    return out.loss, out.denominator, metrics, out.logprob_T


def test_every_mode_chunk_and_tp_gives_the_same_output(ranks):
    """Loss, denominator, metrics and log-probabilities, without a gradient."""
    reference = ranks(1).run(_outputs, 1, "recompute", 1000)[0]
    for tp, mode, chunk in [(1, "one-pass", 1), (2, "one-pass", 7), (2, "recompute", 7), (4, "single-chunk", 7)]:
        for loss, denominator, metrics, logprob in ranks(tp).run(_outputs, tp, mode, chunk):
            torch.testing.assert_close(loss, reference[0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(logprob, reference[3], rtol=1e-5, atol=1e-5)
            assert int(denominator) == int(reference[1]) > 0
            assert metrics.keys() == reference[2].keys()
            for name, pair in metrics.items():
                assert pair == pytest.approx(reference[2][name], rel=1e-5, abs=1e-5), name
