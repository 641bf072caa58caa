"""The reverse KL on the student's own top-k: with all ids as top-k it is the exact one, in every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_tropd.objectives.methods import ObjectiveSettings, make_objective
from megatron_tropd.rollout.engine import SamplingParams
from megatron_tropd.setup.run_spec import make_run_spec
from megatron_tropd.types import Region, Rollout, StepContext
from tests.dense import dense_stats, random_batch
from tests.hf_models import VOCAB_SIZE, save_hf_checkpoint
from tests.tiny_run import flags, make_world, train_here

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor_model_parallel_size": 2, "teacher_pipeline_model_parallel_size": 2}, {"num_minibatches": 2}],
    ids=["one rank", "TP 2, teacher PP 2", "DP 2, two updates"],
)
def test_with_the_whole_vocabulary_it_is_the_exact_reverse_kl(ranks, world, tmp_path, measured, layout):
    pool = ranks(2 if layout else 1)
    whole = {"train_iters": 2, "guidance": "ratio", "guidance_steps": 4, **layout}
    exact = pool.run(train_here, flags(world, tmp_path / "a", objective="full_rkl", **whole))[0]
    support = {"rkl_support": "raw", "top_k": VOCAB_SIZE}
    found = pool.run(train_here, flags(world, tmp_path / "b", objective="topk_rkl", **support, **whole))[0]
    worst = max(abs(a - b) / abs(b) for f, e in zip(found, exact, strict=True) for a, b in zip(f, e, strict=True))
    measured("reverse KL on a top-k of all ids against full_rkl (relative)", worst, TOLERANCE)


@pytest.mark.slow
def test_a_batch_that_waits_in_a_checkpoint_keeps_its_ids(ranks, world, tmp_path):
    pool = ranks(1)
    changes = {"objective": "topk_rkl", "rollout_lag": 1, "train_iters": 4, "save_interval": 2}
    whole = pool.run(train_here, flags(world, tmp_path / "whole", **changes))[0]
    argv = flags(world, tmp_path / "parts", **changes)
    first = pool.run(train_here, argv, 2)[0]
    assert [*first, *pool.run(train_here, argv)[0]] == whole


def test_the_tail_is_below_the_exact_divergence_and_above_zero():
    """By the rule itself, with the student's top-k in the place of the teacher's."""
    logits, teacher, tokens = random_batch(num_tokens=200, vocab_size=56, top_k=6, seed=3, scale=3.0)
    objective = make_objective("topk_rkl", ObjectiveSettings(top_k=6))
    assert objective.needs.score.topk_of == "student" and objective.needs.student_top_k == 6
    log_p, log_q = logits.double().log_softmax(-1), teacher.double().log_softmax(-1)
    ids = log_p.topk(6).indices
    tokens = replace(tokens, teacher_topk_ids_TK=ids, teacher_topk_logprob_TK=log_q.gather(1, ids))
    stats = dense_stats(logits, teacher, tokens, objective.needs)
    written = tokens.region_T == Region.ON_POLICY
    found = objective(stats, tokens, StepContext()).token_loss_T[written]
    exact = (log_p.exp() * (log_p - log_q)).sum(-1)[written]
    assert bool((found <= exact + 1e-9).all()) and bool((found >= -1e-9).all()) and bool((found > 1e-3).any())


@pytest.mark.slow
def test_a_waiting_batch_without_the_ids_is_written_again(ranks, world, tmp_path):
    """Of another method, or with another --top-k: its prompts are taken again."""
    pool = ranks(1)
    changes = {"rollout_lag": 1, "train_iters": 4, "save_interval": 2, "allow_changed_run": True}
    pool.run(train_here, flags(world, tmp_path / "run", objective="opd", **changes), 2)
    assert len(pool.run(train_here, flags(world, tmp_path / "run", objective="topk_rkl", **changes))[0]) == 2


def test_the_embedded_engine_reports_the_most_probable_ids(tmp_path):
    from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
    from megatron_tropd.types import GenerationRequest
    from tests.hf_models import make_hf_model

    directory = save_hf_checkpoint(tmp_path / "m", "qwen3", seed=4) or tmp_path / "m"
    engine = EmbeddedEngine(directory, stop_token_ids=[2])
    model = make_hf_model("qwen3", seed=4)
    engine.begin_update(1)
    engine.update(model.state_dict().items())
    engine.end_update(1)
    requests = [
        GenerationRequest(
            prompt_uid=uid, sample_index=0, token_ids=(5, 6, 7)[: 1 + uid], prompt_len=1 + uid, guidance_len=0,
            max_new_tokens=new,
        )
        for uid, new in enumerate((7, 0, 4))
    ]  # fmt: skip
    rollouts = engine.generate(requests, SamplingParams(seed=1, step=0, report_top_k=5))
    assert rollouts[1].topk_ids is None and not rollouts[1].logprobs
    for rollout in (rollouts[0], rollouts[2]):
        with torch.no_grad():
            logits = model(torch.tensor([rollout.token_ids])).logits[0, rollout.prompt_len - 1 : -1]
        assert torch.equal(rollout.topk_ids.long().sort(1).values, logits.topk(5).indices.sort(1).values)


def test_a_rollout_without_its_ids_is_told():
    from megatron_tropd.data.packing import plan_packs
    from megatron_tropd.teacher.scoring import _pack

    rollout = Rollout(
        prompt_uid=8, sample_index=1, token_ids=(3, 4, 5), prompt_len=1, guidance_len=0, logprobs=(-1.0, -1.0),
        weight_version=(0, 0), finish="stop",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"prompt 8 sample 1 brings the student's top-k as None; expected \(2, 5\)"):
        _pack([rollout], plan_packs([3], data_parallel_size=1, max_tokens=4), 5)


def test_its_top_k_is_not_the_teachers(world, tmp_path):
    from megatron_tropd.cli import ConfigError, parse

    argv = flags(world, tmp_path / "run", objective="topk_rkl", log_topk_overlap=True)
    with pytest.raises(ConfigError, match="--log-topk-overlap compares with the teacher's top-k"):
        make_run_spec(parse(argv), 1)
