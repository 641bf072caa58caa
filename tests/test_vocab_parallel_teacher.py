"""The teacher's head and the student's top-k overlap against dense sorting, with ties, -inf and NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import Needs
from tests.dense import make_streams

HIDDEN, TOKENS, VOCAB, TOP_K = 16, 30, 61, 9


def _inputs(*, ties=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator) * 3.0 / HIDDEN**0.5
    if ties:  # every id has twins in other shards
        weight = weight[torch.arange(VOCAB) % 5]
    return hidden.to(dtype), weight.to(dtype)


def _teacher(tp, top_k=TOP_K, change=None, **kwargs):
    from megatron_tropd.ops.vocab_parallel import VocabShard, teacher_scores
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    hidden, weight = _inputs(**kwargs)
    if change is not None:
        change(hidden, weight)
    rows = replace(groups.layout, make_vocab_size_divisible_by=8).padded_vocab_size(VOCAB) // tp
    padded = torch.cat([weight, torch.full((rows * tp - VOCAB, HIDDEN), 50.0, dtype=weight.dtype)])
    shard = VocabShard(vocab_size=VOCAB, rows_per_rank=rows, group=groups.pg_collection.tp, chunk_tokens=8)
    labels = torch.arange(TOKENS) % VOCAB
    scores = teacher_scores(hidden, padded.chunk(tp)[groups.coords.tp], labels, shard, top_k=top_k, entropy=True)
    return scores.logprob, scores.topk_ids, scores.topk_logprobs, scores.entropy


def _check(results, logits, ids):
    log_q = logits.double().log_softmax(-1)
    for logprob, topk_ids, topk_logprobs, entropy in results:
        expected = log_q.gather(1, (torch.arange(TOKENS) % VOCAB)[:, None])[:, 0]
        torch.testing.assert_close(logprob.double(), expected, atol=2e-6, rtol=1e-6)
        assert torch.equal(topk_ids.long(), ids[:, : topk_ids.shape[1]])
        expected = log_q.gather(1, ids[:, : topk_ids.shape[1]])
        torch.testing.assert_close(topk_logprobs.double(), expected, atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(entropy.double(), -torch.special.xlogy(log_q.exp(), log_q.exp()).sum(-1),
                                   atol=2e-6, rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_teacher_scores_equal_dense_topk_with_ties_by_id(ranks, tp):
    for ties, top_k in [(False, TOP_K), (True, TOP_K), (True, VOCAB), (False, 1)]:
        hidden, weight = _inputs(ties=ties)
        logits = hidden @ weight.t()
        _, ids = torch.sort(logits, dim=-1, descending=True, stable=True)  # stable: ties by id
        _check(ranks(tp).run(_teacher, tp, top_k, None, ties=ties), logits, ids)


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16_logits_tie_and_the_lower_id_wins(ranks, tp):
    """The teacher's own dtype: the oracle sorts the same bf16 logits by (value, id)."""
    hidden, weight = _inputs(dtype=torch.bfloat16)
    logits = (hidden.float() @ weight.float().t()).bfloat16().float()
    _, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    values = logits.gather(1, ids)[:, : TOP_K + 1]
    assert (values[:, 1:] == values[:, :-1]).any(), "the inputs have no tie"
    _check(ranks(tp).run(_teacher, tp, dtype=torch.bfloat16), logits, ids)


def _minus_infinity(hidden, weight):
    hidden[:, 0] = 1.0
    weight[3:40, 0] = -torch.inf  # of 61 ids 24 remain, and whole shards of TP 4 have none


@pytest.mark.parametrize("tp", [1, 4])
def test_minus_infinity_is_a_probability_of_zero(ranks, tp):
    hidden, weight = _inputs()
    _minus_infinity(hidden, weight)
    logits = hidden @ weight.t()
    _, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    for top_k in (TOP_K, 40):  # 40: some of the k have no probability
        _check(ranks(tp).run(_teacher, tp, top_k, _minus_infinity), logits, ids)


def _nan(hidden, weight):
    weight[45, 2] = torch.nan


def _refused(tp, message, top_k, change):
    with pytest.raises(ValueError, match=message):
        _teacher(tp, top_k, change)


def test_bad_requests_and_bad_teachers_are_named_on_every_rank(ranks):
    ranks(2).run(_refused, 2, "--top-k 62 is larger than the vocabulary of 61", 62, None)
    ranks(2).run(_refused, 2, "model gives NaN probabilities at 30 of 30 tokens", TOP_K, _nan)


def _overlap(tp):
    from megatron_tropd.ops.vocab_parallel import HeadSettings, VocabShard, student_token_stats
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    hidden, weight = _inputs()
    streams, _ = make_streams(num_tokens=TOKENS, vocab_size=VOCAB, top_k=20, regions=[0, 3] * (TOKENS // 2))
    rows = replace(groups.layout, make_vocab_size_divisible_by=8).padded_vocab_size(VOCAB) // tp
    padded = torch.cat([weight, torch.full((rows * tp - VOCAB, HIDDEN), 50.0)])
    shard = VocabShard(vocab_size=VOCAB, rows_per_rank=rows, group=groups.pg_collection.tp, chunk_tokens=8)
    stats = student_token_stats(
        hidden[:, None], padded.chunk(tp)[groups.coords.tp], streams, shard, sequence_parallel=False,
        settings=HeadSettings(topk_overlap=True),
    )  # fmt: skip
    return stats.topk_overlap_T


@pytest.mark.parametrize("tp", [1, 2])
def test_topk_overlap_is_the_share_of_common_ids(ranks, tp):
    hidden, weight = _inputs()
    streams, _ = make_streams(num_tokens=TOKENS, vocab_size=VOCAB, top_k=20, regions=[0, 3] * (TOKENS // 2))
    own = (hidden @ weight.t()).topk(20).indices.tolist()
    theirs = streams.teacher_topk_ids_TK.tolist()
    expected = torch.tensor([len(set(a) & set(b)) / 20 for a, b in zip(own, theirs, strict=True)])
    expected[::2] = 0.0  # no response label
    assert 0 < expected[1::2].mean() < 1
    for overlap in ranks(tp).run(_overlap, tp):
        torch.testing.assert_close(overlap, expected)


def _divergence_without(tp, part):
    from megatron_tropd.ops.vocab_parallel import VocabShard, student_token_stats
    from megatron_tropd.parallel.groups import student_groups

    groups = student_groups(ParallelLayout(tp=tp))
    hidden, weight = _inputs()
    streams, _ = make_streams(num_tokens=TOKENS, vocab_size=VOCAB, top_k=0)
    if part != "hidden":
        streams = replace(streams, teacher_hidden_TH=torch.zeros(TOKENS, 4))
    table = {"hidden": torch.zeros(3, 4), "table": None, "width": torch.zeros(3, 5)}[part]
    shard = VocabShard(vocab_size=VOCAB, rows_per_rank=VOCAB, group=groups.pg_collection.tp)
    message = "expected at most the 61 ids" if part == "width" else "needs the teacher's hidden states and its output"
    with pytest.raises(ValueError, match=message):
        student_token_stats(
            hidden[:, None], weight, streams, shard, sequence_parallel=False, teacher_weight=table,
            needs=Needs(divergence="forward_kl"),
        )  # fmt: skip


@pytest.mark.parametrize("part", ["hidden", "table", "width"])
def test_a_divergence_without_its_payload_is_refused(ranks, part):
    ranks(1).run(_divergence_without, 1, part)
