"""The head against dense float64 autograd: loss and per-shard gradients at TP 1, 2, 4."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.objectives.methods import ObjectiveSettings, make_objective
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import StepContext
from tests.dense import make_streams, tropd_losses

HIDDEN = 16


def _inputs(vocab, tokens, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator) * scale / HIDDEN**0.5
    return hidden, weight


def _heads(tp, calls):
    """One call per entry, all in one set of process groups (making gloo groups is what costs)."""
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    return [_head(groups, *call) for call in calls]


def _head(groups, method, vocab, tokens, top_k, chunk, scale, sequence_parallel, regions=None):
    """On one rank: (loss, hidden gradient, gradient of this rank's rows), all from the package."""
    from megatron_tropd.ops.vocab_parallel import VocabShard, head_loss

    tp = groups.layout.tp
    hidden, weight = _inputs(vocab, tokens, scale, seed=vocab + tokens)
    streams, _ = make_streams(num_tokens=tokens, vocab_size=vocab, top_k=top_k, seed=3, regions=regions)
    rows = groups.layout.padded_vocab_size(vocab, 8) // tp
    rank = groups.coords.tp
    # Poisoned padding: a head that reads it is wrong by a mile.
    padded = torch.cat([weight, torch.full((rows * tp - vocab, HIDDEN), 50.0)])
    mine = padded[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    local = hidden.chunk(tp)[rank] if sequence_parallel else hidden
    local = local[:, None].clone().requires_grad_()
    shard = VocabShard(vocab_size=vocab, rows_per_rank=rows, group=groups.pg_collection.tp, chunk_tokens=chunk)
    objective = make_objective(method, ObjectiveSettings(top_k=max(top_k, 1), guidance_beta=0.3))
    out = head_loss(local, mine, streams, shard, objective, StepContext(), sequence_parallel=sequence_parallel)
    out.loss.backward()
    return out.loss.item(), local.grad[:, 0], mine.grad


CASES = [
    # vocab, tokens, top_k, chunk, logit scale
    (7, 1, 1, 10, 1.0),
    (56, 24, 4, 7, 3.0),
    (131, 40, 64, 1, 2.0),
    (1031, 200, 16, 64, 20.0),
    (9, 16, 9, 5, 3.0),  # at TP 4 the last shard (rows 12..15) is padding alone
]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_loss_and_gradients_equal_dense_autograd(ranks, tp, measured):
    calls = [
        (method, *case, sequence_parallel)
        for method in ("opd", "tropd")
        for case in CASES
        for sequence_parallel in ([False, True] if tp > 1 and case[1] % tp == 0 else [False])
    ]
    by_rank = ranks(tp).run(_heads, tp, calls)
    for index, call in enumerate(calls):
        error = _error([results[index] for results in by_rank], *call)
        measured(
            f"{call[0]}: loss and per-shard gradients equal dense float64 autograd, TP {tp} (relative)", error, 2e-6
        )


def _error(results, method, vocab, tokens, top_k, chunk, scale, sequence_parallel):
    hidden, weight = _inputs(vocab, tokens, scale, seed=vocab + tokens)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    streams, _ = make_streams(num_tokens=tokens, vocab_size=vocab, top_k=top_k, seed=3)
    gate = "none" if method == "opd" else "bernoulli"
    losses = tropd_losses(hidden @ weight.t(), streams, beta=0.3, gate=gate)
    losses.sum().backward()
    grad_weight = torch.cat([r[2] for r in results])
    if sequence_parallel:
        grad_hidden = torch.cat([r[1] for r in results])
    else:
        grad_hidden = results[0][1]
        assert all(torch.equal(grad_hidden, r[1]) for r in results)
    assert torch.count_nonzero(grad_weight[vocab:]) == 0, "padding rows received a gradient"
    # Relative to the terms of the sum: K1 rewards have both signs and cancel.
    errors = [abs(loss - losses.sum().item()) / losses.abs().sum().item() for loss, _, _ in results]
    for ours, oracle in ((grad_hidden, hidden.grad), (grad_weight[:vocab], weight.grad)):
        errors.append(float((ours.double() - oracle).norm() / oracle.norm().clamp(min=1e-12)))
    return max(errors)


@pytest.mark.parametrize("tp", [1, 2])
def test_no_response_token_gives_zero_loss_and_zero_gradients(ranks, tp):
    call = ("tropd", 56, 8, 4, 16, 1.0, False, [0, 1] * 4)
    for ((loss, grad_hidden, grad_weight),) in ranks(tp).run(_heads, tp, [call]):
        assert loss == 0.0
        assert torch.count_nonzero(grad_hidden) == 0 and torch.count_nonzero(grad_weight) == 0


def _teacher(tp, vocab, top_k, ties):
    from megatron_tropd.ops.vocab_parallel import VocabShard, teacher_scores
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    hidden, weight = _inputs(vocab, 30, 3.0, seed=1)
    if ties:  # every id has twins in other shards
        weight = weight[torch.arange(vocab) % 5]
    rows = groups.layout.padded_vocab_size(vocab, 8) // tp
    padded = torch.cat([weight, torch.full((rows * tp - vocab, HIDDEN), 50.0)])
    shard = VocabShard(vocab_size=vocab, rows_per_rank=rows, group=groups.pg_collection.tp, chunk_tokens=8)
    labels = torch.arange(30) % vocab
    mine = padded.chunk(tp)[groups.coords.tp]
    scores = teacher_scores(hidden, mine, labels, shard, top_k=top_k, entropy=True)
    return scores.logprob, scores.topk_ids, scores.topk_logprobs, scores.entropy


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_teacher_scores_equal_dense_topk_with_ties_by_id(ranks, tp, ties):
    vocab, top_k = 61, 9
    hidden, weight = _inputs(vocab, 30, 3.0, seed=1)
    if ties:
        weight = weight[torch.arange(vocab) % 5]
    logits = (hidden @ weight.t()).double()
    log_q = logits.log_softmax(-1)
    _, ids = torch.sort(logits.float(), dim=-1, descending=True, stable=True)  # stable: ties by id
    for logprob, topk_ids, topk_logprobs, entropy in ranks(tp).run(_teacher, tp, vocab, top_k, ties):
        torch.testing.assert_close(logprob.double(), log_q.gather(1, (torch.arange(30) % vocab)[:, None])[:, 0],
                                   atol=2e-6, rtol=1e-6)  # fmt: skip
        assert torch.equal(topk_ids.long(), ids[:, :top_k])
        torch.testing.assert_close(topk_logprobs.double(), log_q.gather(1, ids[:, :top_k]), atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(entropy.double(), -(log_q.exp() * log_q).sum(-1), atol=2e-6, rtol=1e-6)


def _too_large(tp):
    with pytest.raises(ValueError, match="--top-k 62 is larger than the vocabulary of 61"):
        _teacher(tp, 61, 62, False)


def test_top_k_larger_than_the_vocabulary_is_refused(ranks):
    ranks(1).run(_too_large, 1)
