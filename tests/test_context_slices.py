"""Which tokens a context rank holds, and attention over them, against code that shares nothing with them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.data.packing import pack, plan_packs
from megatron_tropd.models.context import held_part
from megatron_tropd.parallel.context import held_tokens, packed_order, sequence_multiple, token_multiple
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import Region, Rollout

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def _bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _rollouts(lengths):
    return [
        Rollout(
            prompt_uid=uid, sample_index=0, token_ids=tuple(range(100 * uid, 100 * uid + length)), prompt_len=1,
            guidance_len=0, logprobs=tuple(-0.01 * n for n in range(1, length)), weight_version=(0, 0), finish="length",
        )
        for uid, length in enumerate(lengths, 1)
    ]  # fmt: skip


def _groups(cp, rank):
    layout = ParallelLayout(cp=cp)
    return SimpleNamespace(layout=layout, coords=layout.coords(rank))


@pytest.mark.parametrize("cp", [2, 3, 4])
def test_a_rank_holds_its_two_chunks_of_every_sequence_as_in_megatron(cp):
    """Megatron cuts one sequence after the other; the group is only asked for its size and rank."""
    from unittest.mock import patch

    from megatron.core import utils

    lengths = [2 * cp, 6 * cp, 4 * cp]
    bounds = _bounds(lengths)
    for rank in range(cp):
        with patch.multiple(utils, get_pg_size=lambda _: cp, get_pg_rank=lambda _, rank=rank: rank):
            expected = [
                utils.get_batch_on_this_cp_rank({"tokens": torch.arange(start, stop)[None]}, object())["tokens"][0]
                for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
            ]
        assert torch.equal(held_tokens(bounds, sum(lengths), cp=cp, rank=rank), torch.cat(expected))


@given(st.lists(st.integers(1, 23), max_size=6), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.integers(24, 40))
def test_every_token_is_on_one_rank_with_its_own_label(lengths, cp, tp, max_tokens):
    rollouts = _rollouts(lengths)
    plan = plan_packs(
        lengths, data_parallel_size=1, max_tokens=max_tokens, multiple_of=token_multiple(cp, tp),
        sequence_multiple_of=sequence_multiple(cp),
    )  # fmt: skip
    assert plan.num_tokens % (cp * tp) == 0 and plan.num_tokens < max_tokens + sequence_multiple(cp) + token_multiple(
        cp, tp
    )
    seen = []
    for indices in plan.microbatches[0]:
        whole = pack(
            [rollouts[i] for i in indices], None, num_tokens=plan.num_tokens,
            sequence_multiple_of=plan.sequence_multiple_of,
        )  # fmt: skip
        assert not (whole.cu_seqlens % sequence_multiple(cp)).any() and whole.cu_seqlens[-1] == plan.num_tokens
        assert whole.max_seqlen == whole.cu_seqlens.diff().max()
        starts = whole.cu_seqlens.tolist()
        for place, index in enumerate(indices):
            tokens = whole.token_T[starts[place] : starts[place + 1]].tolist()
            assert tuple(tokens[: lengths[index]]) == rollouts[index].token_ids and not any(tokens[lengths[index] :])
        for rank in range(cp):
            part = held_part(whole, _groups(cp, rank))
            assert len(part.token_T) == len(part.streams.label_T) == plan.num_tokens // cp
            streams = part.streams
            written = (streams.region_T == Region.ON_POLICY).nonzero().flatten()
            assert torch.equal(part.rows.written, written)
            assert torch.equal(streams.label_T[written], part.token_T[written] + 1)
            assert torch.equal(streams.label_position_T[written], part.position_T[written] + 1)
            seen += streams.label_T[written].tolist()
    assert sorted(seen) == sorted(token for rollout in rollouts for token in rollout.token_ids[1:])


def test_gathered_parts_go_back_into_packed_order():
    bounds = _bounds([8, 24, 16])
    tokens = torch.randn(48, 3)
    parts = [tokens[held_tokens(bounds, 48, cp=4, rank=rank)] for rank in range(4)]
    assert torch.equal(torch.cat(parts)[packed_order(bounds, 48, cp=4)], tokens)


def test_without_context_parallelism_nothing_is_cut_or_padded():
    whole = pack(_rollouts([5, 3]), None, num_tokens=10)
    assert held_part(whole, _groups(1, 0)) is whole
    assert sequence_multiple(1) == 1 and [token_multiple(1, tp) for tp in (1, 2, 4)] == [1, 2, 4]
    assert [token_multiple(2, tp) for tp in (1, 2, 4, 3)] == [4, 4, 8, 12]
    assert ParallelLayout(tp=2, cp=2, dp=3, pp=2, vpp=2).frozen == ParallelLayout(tp=2, dp=6, pp=2)


@pytest.mark.parametrize("rank", [0, 1])
def test_angles_of_positions_are_those_of_megatrons_rope_for_packed_sequences(rank):
    """Transformer Engine's fused kernel gets the bounds and finds the positions itself, by the same rule as this."""
    from megatron.core.models.common.embeddings.rope_utils import (
        _apply_rotary_pos_emb_bshd,
        _apply_rotary_pos_emb_thd,
    )

    lengths = [8, 4, 12]
    bounds = _bounds(lengths)
    index = held_tokens(bounds, 24, cp=2, rank=rank)
    position = torch.cat([torch.arange(length) for length in lengths])[index]
    angles = torch.outer(torch.arange(12.0), torch.tensor([1.0, 0.1])).repeat(1, 2)[:, None, None]
    tokens = torch.randn(12, 3, 4)
    group = SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    theirs = _apply_rotary_pos_emb_thd(tokens, bounds, angles, cp_group=group)
    assert torch.equal(_apply_rotary_pos_emb_bshd(tokens[:, None], angles[position])[:, 0], theirs)


def _dense(query, key, value, bounds, scale):
    """Softmax over the tokens before, one sequence and head at a time."""
    scale = HEAD_DIM**-0.5 if scale is None else scale
    out = []
    for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        unseen = ~torch.ones(stop - start, stop - start).tril().bool()
        out.append(((q @ k.transpose(1, 2) * scale).masked_fill(unseen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out)


def _attention_error(cp, lengths, scale):
    """Largest error of values and gradients of this rank's part, in float64."""
    import torch.distributed as dist

    from megatron_tropd.models.attention import context_attention

    generator = torch.Generator().manual_seed(11)
    query, key, value, to = (
        torch.randn(sum(lengths), heads, HEAD_DIM, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    bounds = _bounds(lengths)
    sequences = SimpleNamespace(cu_seqlens_q=bounds, max_seqlen_q=max(lengths))
    index = held_tokens(bounds, sum(lengths), cp=cp, rank=dist.get_rank())
    parts = [x[index].requires_grad_() for x in (query, key, value)]
    out = context_attention(*parts, sequences, scale, dist.group.WORLD)
    mine = [out.detach(), *torch.autograd.grad(out, parts, to[index])]
    inputs = [x.requires_grad_() for x in (query, key, value)]
    whole = _dense(*inputs, bounds, scale)
    theirs = [whole.detach(), *torch.autograd.grad(whole, inputs, to)]
    return max(float((a - b[index]).abs().max()) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_of_parts_equals_dense(ranks, cp, scale, measured):
    errors = ranks(cp).run(_attention_error, cp, [8, 24, 8, 16], scale)
    measured(f"attention at CP {cp}: values and gradients in float64 (max abs)", max(errors), 1e-12)


def test_the_kernels_get_the_bounds_of_padded_sequences():
    from megatron_tropd.models.build import packed_seq_params

    batch = pack(_rollouts([5, 3]), None, num_tokens=16, sequence_multiple_of=4)
    for cp in (1, 2):
        config = SimpleNamespace(apply_rope_fusion=True, context_parallel_size=cp)
        sequences = packed_seq_params(batch, config)
        assert sequences.cu_seqlens_q.tolist() == [0, 8, 12, 16] and sequences.max_seqlen_q == 8
        assert sequences.qkv_format == "thd"
        for padded in (sequences.cu_seqlens_q_padded, sequences.cu_seqlens_kv_padded):
            assert padded is (batch.cu_seqlens if cp > 1 else None)
