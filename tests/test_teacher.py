"""The teacher on the student's ranks, in another layout, against transformers."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.data.packing import plan_packs
from megatron_tropd.parallel.layout import ParallelLayout
from megatron_tropd.types import Rollout, ScoreRequest
from tests.hf_models import VOCAB_SIZE, make_hf_model, save_hf_checkpoint

TOP_K = 7
COMMON_VOCAB = VOCAB_SIZE - 4  # the student knows fewer ids than the teacher has rows


def _rollouts():
    generator = torch.Generator().manual_seed(3)
    rollouts = []
    for uid in range(9):
        prompt, guidance, written = 2 + uid % 3, uid % 4, 1 + uid
        ids = torch.randint(0, COMMON_VOCAB, (prompt + guidance + written,), generator=generator).tolist()
        rollouts.append(
            Rollout(prompt_uid=uid, sample_index=uid % 2, token_ids=tuple(ids), prompt_len=prompt,
                    guidance_len=guidance, logprobs=(0.0,) * written, weight_version=(0, 0), finish="stop")
        )  # fmt: skip
    # A token only the student has: the teacher gives it no probability.
    odd = rollouts[4]
    return [*rollouts[:4], Rollout(
        prompt_uid=4, sample_index=0, token_ids=(*odd.token_ids[:-1], VOCAB_SIZE - 1), prompt_len=odd.prompt_len,
        guidance_len=odd.guidance_len, logprobs=odd.logprobs, weight_version=(0, 0), finish="length",
    ), *rollouts[5:]]  # fmt: skip


def _score(directory, student, teacher, max_tokens, offload=False):
    import torch.distributed as dist

    from megatron_tropd.models.build import build_gpt_model
    from megatron_tropd.models.hf_config import load_architecture
    from megatron_tropd.parallel.groups import student_groups, teacher_groups
    from megatron_tropd.teacher.megatron import MegatronTeacher
    from megatron_tropd.teacher.scorer import Destination
    from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
    from megatron_tropd.weights.files.load import load_hf_into

    arch = load_architecture(directory)
    mine = student_groups(student)
    theirs = teacher_groups(teacher)
    model = build_gpt_model(arch, theirs)
    load_hf_into(model, HfCheckpoint.open(directory, arch), arch, teacher, dist.get_rank())
    scorer = MegatronTeacher(
        model, theirs, vocab_size=COMMON_VOCAB, max_tokens_per_microbatch=max_tokens, logits_chunk_tokens=5,
        offload=offload,
    )  # fmt: skip
    rollouts = _rollouts()
    plan = plan_packs([len(r.token_ids) for r in rollouts], data_parallel_size=student.dp, max_tokens=40)
    scores = scorer.score(
        dict(enumerate(rollouts)), ScoreRequest(top_k=TOP_K, entropy=True), Destination(groups=mine, owners=plan.owners)
    )
    assert not offload or not any(weight.numel() for weight in model.parameters()), "it is not in host memory"
    owned = {i for pack in plan.microbatches[mine.coords.dp] for i in pack} if mine.is_last_stage else set()
    return owned, {i: (s.logprob, s.topk_ids, s.topk_logprobs, s.entropy) for i, s in scores.items()}


def _expected(variant):
    model = make_hf_model(variant)
    for rollout in _rollouts():
        with torch.no_grad():
            logits = model(torch.tensor([rollout.token_ids])).logits[0, rollout.prompt_len - 1 : -1, :COMMON_VOCAB]
        log_q = logits.double().log_softmax(-1)
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])
        known = labels < COMMON_VOCAB
        own = log_q.gather(1, labels.clamp(max=COMMON_VOCAB - 1)[:, None])[:, 0].masked_fill(~known, -torch.inf)
        written = log_q[rollout.guidance_len :]  # of a prefix only the log-probability is sent
        top = written.topk(TOP_K)
        yield own, top.indices, top.values, -(written.exp() * written).sum(-1)


CASES = {
    "one rank": (ParallelLayout(), ParallelLayout(), 300),
    "student DP2, teacher TP2": (ParallelLayout(dp=2), ParallelLayout(tp=2), 30),
    "student TP2, teacher PP2": (ParallelLayout(tp=2), ParallelLayout(pp=2), 30),
    "student PP2, teacher DP2": (ParallelLayout(pp=2), ParallelLayout(dp=2), 30),
    "student TP2 PP2, teacher TP4": (ParallelLayout(tp=2, pp=2), ParallelLayout(tp=4), 300),
    "student CP2 PP2, teacher TP2 DP2": (ParallelLayout(cp=2, pp=2), ParallelLayout(tp=2, dp=2), 30),
    "student TP2 CP2, teacher PP2 DP2": (ParallelLayout(tp=2, cp=2), ParallelLayout(pp=2, dp=2), 30),
    "student DP4, teacher TP2 PP2": (ParallelLayout(dp=4), ParallelLayout(tp=2, pp=2), 30),
}


@pytest.mark.parametrize("name", ["one rank", "student TP2, teacher PP2"])
def test_a_teacher_in_host_memory_gives_the_same_scores(ranks, tmp_path, name):
    student, teacher, max_tokens = CASES[name]
    directory = save_hf_checkpoint(tmp_path / "teacher", "llama_tied")
    given = ranks(student.world_size).run(_score, directory, student, teacher, max_tokens)
    offloaded = ranks(student.world_size).run(_score, directory, student, teacher, max_tokens, True)
    for (_, expected), (_, found) in zip(given, offloaded, strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(a, b) for i in expected for a, b in zip(expected[i], found[i], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_scores_reach_their_owner_and_equal_transformers(ranks, tmp_path, name, measured):
    student, teacher, max_tokens = CASES[name]
    directory = save_hf_checkpoint(tmp_path / "teacher", "llama_tied")
    expected = list(_expected("llama_tied"))
    arrived = set()
    for owned, scores in ranks(student.world_size).run(_score, directory, student, teacher, max_tokens):
        assert set(scores) == owned, "a rank got scores it does not train on, or misses some"
        arrived |= owned
        for index, (logprob, ids, logprobs, entropy) in scores.items():
            own, top_ids, top, spread = expected[index]
            assert torch.equal(logprob.isinf(), own.isinf())
            finite = own.isfinite()
            assert torch.equal(ids.long(), top_ids)
            error = max((a.double() - b).abs().max().item() for a, b in (
                (logprob[finite], own[finite]), (logprobs, top), (entropy, spread)) if len(a))  # fmt: skip
            measured("teacher scores equal transformers, any pair of layouts (nats, max abs)", error, 1e-5)
    assert arrived == set(range(9))
