"""Packing: every token once, labels one ahead, the same shape everywhere."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd import rng
from megatron_tropd.data.packing import count_regions, pack, plan_batch, plan_packs
from megatron_tropd.data.streams import SampleScores
from megatron_tropd.types import Needs, Region, Rollout, TeacherScores

NEEDS = Needs(top_k=2, teacher_entropy=True)


def make_rollout(prompt_uid=0, sample_index=0, prompt=1, guidance=0, written=1):
    """Tokens and log-probabilities that name their own rollout and position."""
    length = prompt + guidance + written
    base = 1 + 1000 * (prompt_uid * 8 + sample_index)
    return Rollout(
        prompt_uid=prompt_uid,
        sample_index=sample_index,
        token_ids=tuple(range(base, base + length)),
        prompt_len=prompt,
        guidance_len=guidance,
        logprobs=tuple(-float(base + prompt + guidance + w) for w in range(written)),
        weight_version=(1, 1),
        finish="stop",
    )


def make_scores(rollout):
    """The log-probability covers the response, everything else what the student wrote."""
    tokens = torch.tensor(rollout.token_ids[rollout.prompt_len :], dtype=torch.float32)
    written = tokens[rollout.guidance_len :]
    return TeacherScores(
        logprob=-tokens / 4,
        topk_ids=torch.stack([written, written + 1], dim=-1).int(),
        topk_logprobs=torch.stack([-written / 8, -written], dim=-1),
        entropy=written / 2,
    )


rollout_lists = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(0, 6)), max_size=14).map(
    lambda sizes: [
        make_rollout(index // 3, index % 3, prompt, guidance, written)
        for index, (prompt, guidance, written) in enumerate(sizes)
    ]
)


@given(
    lengths=st.lists(st.integers(1, 20), max_size=30),
    ranks=st.integers(1, 5),
    max_tokens=st.integers(20, 60),
    multiple_of=st.sampled_from([1, 4, 8]),
)
def test_plan_invariants(lengths, ranks, max_tokens, multiple_of):
    plan = plan_packs(lengths, data_parallel_size=ranks, max_tokens=max_tokens, multiple_of=multiple_of)
    assert len(plan.microbatches) == ranks
    assert {len(packs) for packs in plan.microbatches} == {plan.num_microbatches} and plan.num_microbatches >= 1
    placed = [index for packs in plan.microbatches for pack_ in packs for index in pack_]
    assert sorted(placed) == list(range(len(lengths)))
    for rank, packs in enumerate(plan.microbatches):
        assert all(plan.owner(index) == rank for pack_ in packs for index in pack_)
    fills = [sum(lengths[index] for index in pack_) for packs in plan.microbatches for pack_ in packs]
    assert max(fills) <= max_tokens
    assert plan.num_tokens == max(1, -(-max(fills) // multiple_of)) * multiple_of
    assert plan.fill == pytest.approx(sum(lengths) / (plan.num_tokens * len(fills)))
    loads = [sum(lengths[index] for pack_ in packs for index in pack_) for packs in plan.microbatches]
    assert not lengths or max(loads) - min(loads) <= max(lengths)
    again = plan_packs(lengths, data_parallel_size=ranks, max_tokens=max_tokens, multiple_of=multiple_of)
    assert again == plan


def test_plan_evens_out_the_micro_batches():
    plan = plan_packs([10] * 11, data_parallel_size=1, max_tokens=100)
    assert plan.num_microbatches == 2 and plan.num_tokens == 60 and plan.fill == pytest.approx(110 / 120)
    # First-fit fits these into two, an even spread by length would not.
    tight = plan_packs([6, 5, 4, 3, 2], data_parallel_size=1, max_tokens=10)
    assert tight.num_microbatches == 2 and tight.num_tokens == 10 and tight.fill == 1


def test_plan_without_rollouts_is_one_padded_micro_batch():
    plan = plan_packs([], data_parallel_size=2, max_tokens=10, multiple_of=4)
    assert plan.microbatches == (((),), ((),)) and plan.num_tokens == 4 and plan.fill == 0


def test_plan_names_the_rollout_that_is_too_long():
    with pytest.raises(ValueError, match=r"rollout 1 of prompt 77 has 11 tokens.*--max-tokens-per-microbatch 10"):
        plan_packs([3, 11], data_parallel_size=1, max_tokens=10, prompt_uids=[5, 77])
    with pytest.raises(ValueError, match=r"rollout 0 has 0 tokens"):
        plan_packs([0], data_parallel_size=1, max_tokens=10)
    with pytest.raises(ValueError, match="at least 1"):
        plan_packs([1], data_parallel_size=0, max_tokens=10)


@settings(deadline=None)
@given(rollouts=rollout_lists, ranks=st.integers(1, 3), max_tokens=st.integers(16, 40))
@pytest.mark.fault(number=27)
def test_packed_step_holds_every_token_and_label_once(rollouts, ranks, max_tokens):
    scores = [make_scores(rollout) for rollout in rollouts]
    plan = plan_packs([len(r.token_ids) for r in rollouts], data_parallel_size=ranks, max_tokens=max_tokens)
    counts = dict.fromkeys(Region, 0)
    seen = []
    for packs in plan.microbatches:
        for indices in packs:
            chosen = [rollouts[index] for index in indices]
            batch = pack(
                chosen,
                [SampleScores(teacher=scores[index]) for index in indices],
                num_tokens=plan.num_tokens,
                needs=NEEDS,
            )
            check_microbatch(batch, chosen, plan.num_tokens)
            seen += batch.token_T[batch.streams.sample_uid_T >= 0].tolist()
            for region in Region:
                counts[region] += int((batch.streams.region_T == region).sum())
    assert sorted(seen) == sorted(token for rollout in rollouts for token in rollout.token_ids)
    assert count_regions(rollouts) == {"guidance": counts[Region.GUIDANCE], "on_policy": counts[Region.ON_POLICY]}
    copies = sum(r.guidance_len for r in rollouts if r.sample_index)
    assert counts[Region.GUIDANCE_COPY] == copies
    assert counts[Region.PROMPT] == sum(r.prompt_len - 1 for r in rollouts)


def check_microbatch(batch, rollouts, num_tokens):
    """Every stream of one micro-batch, position by position."""
    bounds = batch.cu_seqlens.tolist()
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    padding = num_tokens - sum(lengths)
    expected = [*lengths, padding] if padding else lengths
    assert [b - a for a, b in pairwise(bounds)] == expected and bounds[-1] == num_tokens
    assert batch.max_seqlen == max(expected)
    assert batch.position_T.tolist() == [position for length in expected for position in range(length)]
    for start, rollout in zip(bounds, rollouts, strict=False):
        for position in range(len(rollout.token_ids)):
            check_position(batch, start + position, position, rollout)
    check_padding(batch, slice(num_tokens - padding, num_tokens))


def check_position(batch, at, position, rollout):
    token = rollout.token_ids[position]
    assert batch.token_T[at] == token
    assert batch.streams.sample_uid_T[at] == rng.sample_uid(rollout.prompt_uid, rollout.sample_index)
    label = position + 1
    if label == len(rollout.token_ids):
        check_padding(batch, slice(at, at + 1), token=token, uid=int(batch.streams.sample_uid_T[at]))
        return
    name = rollout.token_ids[label]
    assert batch.streams.label_T[at] == name and batch.streams.label_position_T[at] == label
    if label < rollout.prompt_len:
        region = Region.PROMPT
    elif label < rollout.prompt_len + rollout.guidance_len:
        region = Region.GUIDANCE if rollout.sample_index == 0 else Region.GUIDANCE_COPY
    else:
        region = Region.ON_POLICY
    assert batch.streams.region_T[at] == region
    assert batch.streams.rollout_logprob_T[at] == (-name if region == Region.ON_POLICY else 0)
    streams = batch.streams
    assert streams.teacher_logprob_T[at] == (0 if region == Region.PROMPT else -name / 4)
    if region == Region.ON_POLICY:
        assert streams.teacher_entropy_T[at] == name / 2
        assert streams.teacher_topk_ids_TK[at].tolist() == [name, name + 1]
        assert streams.teacher_topk_logprob_TK[at].tolist() == [-name / 8, -name]
    else:
        assert streams.teacher_entropy_T[at] == 0 and torch.isneginf(streams.teacher_topk_logprob_TK[at]).all()


def check_padding(batch, where, token=0, uid=-1):
    assert (batch.token_T[where] == token).all() and (batch.streams.sample_uid_T[where] == uid).all()
    zero = (
        batch.streams.label_T,
        batch.streams.region_T,
        batch.streams.label_position_T,
        batch.streams.rollout_logprob_T,
        batch.streams.teacher_logprob_T,
    )
    assert all((stream[where] == 0).all() for stream in zero)
    if batch.streams.teacher_topk_ids_TK is not None:
        assert (batch.streams.teacher_topk_ids_TK[where] == 0).all()
        assert torch.isneginf(batch.streams.teacher_topk_logprob_TK[where]).all()
    if batch.streams.teacher_entropy_T is not None:
        assert (batch.streams.teacher_entropy_T[where] == 0).all()


def test_dtypes_and_widths():
    rollout = make_rollout(prompt=2, guidance=1, written=2)
    batch = pack([rollout], [SampleScores(teacher=make_scores(rollout))], num_tokens=8, needs=NEEDS)
    for stream in (
        batch.token_T,
        batch.streams.label_T,
        batch.position_T,
        batch.streams.sample_uid_T,
        batch.streams.label_position_T,
    ):
        assert stream.dtype == torch.int64 and stream.shape == (8,)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.streams.region_T.dtype == torch.uint8
    assert batch.streams.teacher_topk_ids_TK.dtype == torch.int64 and batch.streams.teacher_topk_ids_TK.shape == (8, 2)
    for stream in (batch.streams.rollout_logprob_T, batch.streams.teacher_logprob_T, batch.streams.teacher_entropy_T):
        assert stream.dtype == torch.float32


def test_the_rows_of_each_role_are_those_of_its_regions():
    rollouts = [
        make_rollout(prompt=2, guidance=2, written=3),
        make_rollout(sample_index=1, prompt=2, guidance=2, written=0),
        make_rollout(prompt=1, written=2),
    ]
    batch = pack(rollouts, None, num_tokens=16)
    roles = {
        "loss": {Region.GUIDANCE, Region.ON_POLICY},
        "response": {Region.GUIDANCE, Region.ON_POLICY, Region.GUIDANCE_COPY},
        "prefix": {Region.GUIDANCE, Region.GUIDANCE_COPY},
        "written": {Region.ON_POLICY},
    }
    for role, regions in roles.items():
        expected = [row for row, region in enumerate(batch.streams.region_T.tolist()) if region in regions]
        assert getattr(batch.rows, role).tolist() == expected, role
    assert len(batch.rows.written) == 5
    assert len(pack([], None, num_tokens=5).rows.loss) == 0


def test_micro_batch_of_padding_has_the_fields_of_the_others():
    batch = pack([], [], num_tokens=5, needs=NEEDS)
    assert batch.cu_seqlens.tolist() == [0, 5] and batch.max_seqlen == 5
    assert batch.streams.teacher_topk_ids_TK.shape == (5, 2) and batch.streams.teacher_entropy_T.shape == (5,)
    check_padding(batch, slice(0, 5))
    plain = pack([], None, num_tokens=5)
    assert plain.streams.teacher_topk_ids_TK is None and plain.streams.teacher_topk_logprob_TK is None
    assert plain.streams.teacher_entropy_T is None


def test_packing_without_scores_leaves_the_teacher_blank():
    batch = pack([make_rollout(prompt=2, written=3)], None, num_tokens=5)
    assert (batch.streams.teacher_logprob_T == 0).all() and batch.streams.teacher_topk_ids_TK is None
    assert batch.cu_seqlens.tolist() == [0, 5]


def test_payloads_must_match():
    rollout = make_rollout(prompt_uid=9, prompt=2, guidance=1, written=2)
    scores = SampleScores(teacher=make_scores(rollout))

    def refused(match, sample_scores, needs=NEEDS):
        with pytest.raises(ValueError, match=match):
            pack([rollout], sample_scores, num_tokens=8, needs=needs)

    refused(r"prompt 9 sample 0: teacher top-k ids has shape \(2, 2\), expected \(2, 4\)", [scores], Needs(top_k=4))
    refused(
        r"entropy has shape None, expected \(2,\)",
        [SampleScores(teacher=TeacherScores(logprob=torch.zeros(3)))],
        Needs(teacher_entropy=True),
    )
    refused(r"log-probability has shape \(4,\)", [SampleScores(teacher=TeacherScores(logprob=torch.zeros(4)))], Needs())
    refused("teacher log-probability has shape None", [SampleScores()], Needs())
    refused("old log-probability has shape None", [scores], Needs(old_logprob=True))
    refused("prompt 9 sample 0 has no advantage", [scores], Needs(rewards=True))
    refused("scores of 2 samples for 1 rollouts", [scores, scores])
    refused("needs a teacher that sends its hidden states", [scores], Needs(divergence="forward_kl"))
    with pytest.raises(ValueError, match="5 tokens do not fit a micro-batch of 4"):
        pack([rollout], None, num_tokens=4)


EVERYTHING = Needs(
    top_k=2, teacher_entropy=True, divergence="forward_kl", reference_logprob=True, old_logprob=True, rewards=True
)


def test_every_stream_reaches_its_label_and_exists_only_where_asked():
    rollouts = [
        make_rollout(3, 0, prompt=2, guidance=1, written=2),
        make_rollout(4, 1, prompt=1, guidance=2, written=1),
    ]
    sample_scores = []
    for rollout in rollouts:
        names = torch.tensor(rollout.token_ids[rollout.prompt_len :], dtype=torch.float32)
        own = names[rollout.guidance_len :]
        scores = make_scores(rollout)
        hidden = torch.stack([own, -own, 2 * own], 1).bfloat16()
        sample_scores.append(
            SampleScores(
                teacher=TeacherScores(
                    logprob=scores.logprob, topk_ids=scores.topk_ids, topk_logprobs=scores.topk_logprobs,
                    entropy=scores.entropy, hidden=hidden,
                ),
                reference_logprob=names * 3, old_logprob=names * 5, old_entropy=own * 7,
                advantage=float(rollout.prompt_uid),
            )
        )  # fmt: skip
    like = torch.empty(0, 3, dtype=torch.bfloat16)
    streams = pack(rollouts, sample_scores, num_tokens=11, needs=EVERYTHING, teacher_hidden=like).streams
    response = streams.region_T > Region.PROMPT
    names = torch.where(response, streams.label_T, 0).float()
    assert torch.equal(streams.reference_logprob_T, names * 3)
    written = streams.region_T == Region.ON_POLICY
    own = torch.where(written, names, 0)
    assert torch.equal(streams.old_logprob_T, names * 5) and torch.equal(streams.old_entropy_T, own * 7)
    assert streams.teacher_hidden_TH.dtype == torch.bfloat16
    assert torch.equal(streams.teacher_hidden_TH, torch.stack([own, -own, 2 * own], 1).bfloat16())
    prompt_uid = (streams.sample_uid_T >> 20).float()
    assert torch.equal(streams.advantage_T, torch.where(written, prompt_uid, 0.0))
    for rollout in rollouts:
        old = 5 * torch.tensor(rollout.token_ids[rollout.prompt_len + rollout.guidance_len :]).float()
        error = (old - torch.tensor(rollout.logprobs)).abs().exp().mean()
        mine = written & (streams.sample_uid_T == rng.sample_uid(rollout.prompt_uid, rollout.sample_index))
        assert torch.equal(streams.sequence_error_T[mine], error.expand(int(mine.sum())))
    assert (streams.sequence_error_T[~written] == 0).all()
    assert streams.sample_start_T.nonzero().flatten().tolist() == [2, 7] and written[[2, 7]].all()
    optional = {name for name in streams.__dataclass_fields__ if getattr(streams, name) is not None}
    plain = pack(rollouts, None, num_tokens=11).streams
    assert optional - {name for name in plain.__dataclass_fields__ if getattr(plain, name) is not None} == {
        "teacher_topk_ids_TK", "teacher_topk_logprob_TK", "teacher_entropy_T", "teacher_hidden_TH",
        "reference_logprob_T", "old_logprob_T", "old_entropy_T", "sequence_error_T", "advantage_T",
    }  # fmt: skip


@given(num_prompts=st.integers(1, 9), num_samples=st.integers(1, 3), num_minibatches=st.integers(1, 9))
def test_minibatches_are_even_and_keep_the_samples_of_a_prompt_together(num_prompts, num_samples, num_minibatches):
    rollouts = [make_rollout(uid, sample, written=1 + uid % 4) for uid in range(num_prompts)
                for sample in range(num_samples)]  # fmt: skip
    if num_minibatches > num_prompts:
        with pytest.raises(ValueError, match=f"--num-minibatches {num_minibatches}"):
            plan_batch(rollouts, num_minibatches=num_minibatches, data_parallel_size=2, max_tokens=12)
        return
    plan = plan_batch(rollouts, num_minibatches=num_minibatches, data_parallel_size=2, max_tokens=12)
    parts = [[i for packs in part.microbatches for pack_ in packs for i in pack_] for part in plan.minibatches]
    assert len(parts) == num_minibatches
    assert sorted(index for part in parts for index in part) == list(range(len(rollouts)))
    prompts = [{rollouts[index].prompt_uid for index in part} for part in parts]
    assert sum(map(len, prompts)) == num_prompts, "a prompt is in two minibatches"
    assert max(map(len, prompts)) - min(map(len, prompts)) <= 1
    assert plan.owners == {i: r for part in plan.minibatches for i, r in part.owners.items()}


def test_the_number_of_microbatches_is_rounded_up():
    """Megatron's interleaved schedule takes them in groups."""
    lengths = [5, 5, 5, 4]
    plan = plan_packs(lengths, data_parallel_size=1, max_tokens=8, num_microbatches_multiple_of=3)
    assert plan.num_microbatches == 6 and plan.num_tokens == 5
    assert sorted(index for packs in plan.microbatches[0] for index in packs) == [0, 1, 2, 3]
    assert plan_packs([3], data_parallel_size=2, max_tokens=8, num_microbatches_multiple_of=2).num_microbatches == 2
