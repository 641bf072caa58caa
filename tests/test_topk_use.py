"""The teacher sends its top-k only for tokens whose loss may read it: the same bits as with all of it, in fewer bytes."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
import torch

from megatron_tropd import rng
from megatron_tropd.cli import parse
from megatron_tropd.data.packing import pack
from megatron_tropd.data.streams import SampleScores
from megatron_tropd.objectives.gates import Gate
from megatron_tropd.objectives.methods import METHODS, make_objective
from megatron_tropd.objectives.settings import ObjectiveSettings
from megatron_tropd.objectives.topk_use import may_use_topk, measured, request_of
from megatron_tropd.teacher.dedicated.messages import read_score, score_message
from megatron_tropd.teacher.topk_selection import select_topk
from megatron_tropd.training.parity import ParityAlarm, ParityError
from megatron_tropd.types import Needs, Rollout, StepContext, TeacherScores, TokenStats
from tests.dense import dense_stats, random_batch
from tests.hf_models import read_tensors, write_tensors
from tests.tiny_run import flags, make_world, reports_here

SEED, STEP, MARGIN, TOP_K, VOCAB = 5, 3, 0.05, 4, 31
GATES = {
    "bernoulli": Gate(kind="bernoulli"),
    "expected": Gate(kind="expected"),
    "threshold": Gate(kind="threshold"),
    "probability": Gate(kind="probability"),
    "none": Gate(kind="none"),
}


def _rollout(written=400, prompt=3, guidance=2, uid=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (prompt + guidance + written,), generator=generator).tolist()
    logprobs = (-3 * torch.rand(written, generator=generator)).tolist()
    return Rollout(
        prompt_uid=uid, sample_index=1, token_ids=tuple(ids), prompt_len=prompt, guidance_len=guidance,
        logprobs=tuple(logprobs), weight_version=(0, 0), finish="stop",
    )  # fmt: skip


def _scores(rollout, seed=1):
    """A teacher near the student, which excludes every 50th token."""
    generator = torch.Generator().manual_seed(seed)
    written = len(rollout.logprobs)
    logprob = torch.tensor(rollout.logprobs) + 1.5 * torch.randn(written, generator=generator)
    logprob = logprob.clamp(max=-1e-3)
    logprob[::50] = -torch.inf
    full = torch.randn(written, VOCAB, generator=generator).log_softmax(-1).sort(descending=True)
    return TeacherScores(
        logprob=torch.cat([torch.full((rollout.guidance_len,), -1.0), logprob]),
        topk_ids=full.indices[:, :TOP_K].int(), topk_logprobs=full.values[:, :TOP_K],
        entropy=3 * torch.rand(written, generator=generator),
    )  # fmt: skip


def _weights(gate, rollout, scores, trainer_W):
    """The gate's weights in the trainer, whose log-probabilities are ``trainer_W``, through the packed batch."""
    needs = Needs(top_k=TOP_K)
    packed = pack([rollout], [SampleScores(teacher=scores)], num_tokens=len(rollout.token_ids), needs=needs)
    streams = packed.streams
    coins = rng.key(SEED, rng.Stream.GATE, STEP)
    streams = replace(streams, uniform_T=rng.uniform(coins, streams.sample_uid_T, streams.label_position_T))
    streams = streams.rows(packed.rows.written)
    from megatron_tropd.objectives.base import Regions
    from megatron_tropd.objectives.labels import Labels

    stats = TokenStats(logprob_T=trainer_W)
    labels = Labels(
        stats=stats, tokens=streams, context=StepContext(step=STEP), regions=Regions.of(streams),
        behaviour_logprob_T=trainer_W, reward_T=streams.teacher_logprob_T - trainer_W,
    )  # fmt: skip
    return gate(labels)


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("gap", [-0.999 * MARGIN, 0.0, 0.999 * MARGIN])
def test_no_token_that_the_trainer_rejects_is_without_its_topk(kind, gap):
    rollout = _rollout()
    scores, gate = _scores(rollout), GATES[kind]
    use = replace(gate.topk_use(MARGIN), seed=SEED, step=STEP)
    chosen_W = may_use_topk(use, scores, rollout)
    weight_W = _weights(gate, rollout, scores, torch.tensor(rollout.logprobs) + gap)
    assert not (~chosen_W & (weight_W < 1)).any()
    assert (weight_W < 1).any() and 0 < float(chosen_W.double().mean()) < 0.98, "some are needed, some are not"
    assert chosen_W[::50].all(), "the teacher excludes these: never trusted"


def test_beyond_the_margin_a_rejected_token_has_none():
    """The negative control of the test above, and of the metric that counts such tokens."""
    rollout = _rollout()
    scores, gate = _scores(rollout), GATES["bernoulli"]
    chosen_W = may_use_topk(replace(gate.topk_use(MARGIN), seed=SEED, step=STEP), scores, rollout)
    weight_W = _weights(gate, rollout, scores, torch.tensor(rollout.logprobs) + 10 * MARGIN)
    assert (~chosen_W & (weight_W < 1)).any()
    other_coins_W = may_use_topk(replace(gate.topk_use(MARGIN), seed=SEED + 1, step=STEP), scores, rollout)
    weight_W = _weights(gate, rollout, scores, torch.tensor(rollout.logprobs))
    assert (~other_coins_W & (weight_W < 1)).any(), "the coins are those of seed and step"


def test_measured_samples_are_whole_and_have_their_share():
    uids = torch.tensor([rng.sample_uid(prompt, sample) for prompt in range(2000) for sample in range(2)])
    chosen = measured(uids, 0.25, STEP)
    assert abs(float(chosen.double().mean()) - 0.25) < 0.03
    assert not measured(uids, 0.0, STEP).any() and measured(uids, 1.0, STEP).all()
    assert not torch.equal(chosen, measured(uids, 0.25, STEP + 1))
    rollout = _rollout()
    use = replace(GATES["bernoulli"].topk_use(MARGIN), share=1.0)
    assert may_use_topk(use, _scores(rollout), rollout).all()


def test_eopd_needs_the_topk_where_the_teacher_is_unsure():
    rollout = _rollout()
    scores = _scores(rollout)
    needs = make_objective("eopd", ObjectiveSettings(top_k=TOP_K, topk_margin=MARGIN)).needs
    use = request_of(needs, seed=SEED, step=STEP).topk_use
    assert torch.equal(may_use_topk(use, scores, rollout), scores.entropy > 0.8)


SAVING = {
    "fkl_outlier": {}, "aopd": {}, "tropd": {}, "tropd_paper": {}, "tropd_aopd": {}, "tropd_official": {},
    "tropd_plus": {}, "tropd_floor": {}, "eopd": {},
}  # fmt: skip


def test_methods_with_a_gate_save_and_the_others_ask_for_everything():
    def uses(**changes):
        settings = ObjectiveSettings(top_k=TOP_K, **changes)
        return {name for name in METHODS if make_objective(name, settings).needs.topk_use}

    assert uses() == set()
    assert uses(topk_margin=MARGIN) == set(SAVING)
    assert uses(topk_margin=MARGIN, rollout_lag=1) == {"eopd"}, "the gate reads newer weights than those that wrote"
    assert uses(topk_margin=MARGIN, rollout_lag=1, reward_logprob="rollout") == set(SAVING)


def test_the_margin_follows_the_parity_limit(tmp_path):
    def margin(**changes):
        argv = flags(tmp_path, tmp_path / "run", **changes)
        return parse(argv).objective_settings.topk_margin

    assert margin() == pytest.approx(5e-3) and margin(bf16=True) == pytest.approx(0.5)
    assert margin(parity_limit=0.02) == pytest.approx(0.1)
    assert margin(teacher_topk_margin=0.3) == 0.3 and margin(teacher_topk_margin=0) == 0


@pytest.mark.parametrize("settings", [{}, {"tropd_aopd_reading": "union_fkl"}, {"gate": "expected"}], ids=str)
@pytest.mark.parametrize("method", SAVING)
def test_losses_and_gradients_have_the_same_bits(method, settings):
    """Every label of a random batch, with the top-k of all tokens and of those that may need it."""
    logits, teacher, tokens = random_batch(num_tokens=160, vocab_size=VOCAB, top_k=TOP_K, seed=6, scale=6.0)
    objective = make_objective(
        method, ObjectiveSettings(top_k=TOP_K, topk_margin=MARGIN, teacher_entropy_threshold=1.5, **settings)
    )

    def run(tokens):
        leaf = logits.clone().requires_grad_()
        out = objective(dense_stats(leaf, teacher, tokens, objective.needs), tokens, StepContext())
        out.token_loss_T.sum().backward()
        return out, leaf.grad

    own_T = logits.log_softmax(-1).gather(1, tokens.label_T[:, None])[:, 0]
    use = objective.needs.topk_use
    low_T = tokens.teacher_logprob_T - own_T - MARGIN
    certain_T = {
        "bernoulli": tokens.uniform_T.log() < low_T,
        "reward": low_T > use.limit,
        "probability": tokens.teacher_logprob_T.exp() - (own_T + MARGIN).exp() > use.limit,
        "teacher_entropy": None if tokens.teacher_entropy_T is None else tokens.teacher_entropy_T <= use.limit,
    }[use.kind]
    assert certain_T.any() and not certain_T.all()
    saved = replace(
        tokens,
        teacher_topk_ids_TK=torch.where(certain_T[:, None], 0, tokens.teacher_topk_ids_TK),
        teacher_topk_logprob_TK=torch.where(certain_T[:, None], -torch.inf, tokens.teacher_topk_logprob_TK),
    )
    (whole, gradient), (part, gradient_saved) = run(tokens), run(saved)
    assert torch.equal(whole.token_loss_T, part.token_loss_T) and torch.equal(gradient, gradient_saved)
    assert part.metrics["teacher/topk_missing_frac"].total == 0
    none = replace(saved, teacher_topk_logprob_TK=torch.full_like(tokens.teacher_topk_logprob_TK, -torch.inf))
    assert run(none)[0].metrics["teacher/topk_missing_frac"].total > 0, "rejected, and no top-k came"


def test_rows_of_the_topk_are_written_where_they_belong():
    rollout = _rollout(written=6)
    scores, needs = _scores(rollout), Needs(top_k=TOP_K)
    first = rollout.prompt_len - 1 + rollout.guidance_len

    def streams(scores):
        return pack([rollout], [SampleScores(teacher=scores)], num_tokens=16, needs=needs).streams

    dense = streams(scores)
    rows = torch.tensor([1, 4], dtype=torch.int32)
    some = replace(scores, topk_rows=rows, topk_ids=scores.topk_ids[rows], topk_logprobs=scores.topk_logprobs[rows])
    sparse = streams(some)
    for row in range(16):
        if row - first in (1, 4):
            assert torch.equal(sparse.teacher_topk_logprob_TK[row], dense.teacher_topk_logprob_TK[row])
            assert torch.equal(sparse.teacher_topk_ids_TK[row], dense.teacher_topk_ids_TK[row])
        else:
            assert (sparse.teacher_topk_logprob_TK[row] == -torch.inf).all()
    for bad in ([1, 6], [4, 1], [-1, 2], [1, 1]):
        with pytest.raises(ValueError, match=r"prompt 11 sample 1: the teacher's top-k is for tokens .* below the 6"):
            streams(replace(some, topk_rows=torch.tensor(bad, dtype=torch.int32)))
    with pytest.raises(ValueError, match=r"top-k ids has shape \(2, 4\), expected \(3, 4\)"):
        streams(replace(some, topk_rows=torch.tensor([0, 1, 4], dtype=torch.int32)))


def test_the_request_crosses_to_a_teacher_on_its_own_ranks():
    needs = make_objective("tropd", ObjectiveSettings(top_k=TOP_K, topk_margin=MARGIN, gate="none")).needs
    want = request_of(needs, seed=(1 << 32) - 1, step=STEP)
    assert want.topk_use.limit == -math.inf
    step, rollouts, arrived = read_score(score_message(7, {2: _rollout()}, want))
    assert (step, arrived, list(rollouts)) == (7, want, [2])
    plain = request_of(Needs(top_k=TOP_K), seed=1, step=STEP)
    assert read_score(score_message(7, {}, plain))[2] == plain


def test_scores_without_a_topk_are_left_as_they_are():
    scores = replace(_scores(_rollout()), topk_ids=None, topk_logprobs=None)
    assert select_topk(scores, _rollout(), GATES["bernoulli"].topk_use(MARGIN)) is scores


def test_the_alarm():
    alarm = ParityAlarm(1e-3, "stop")
    assert alarm.judge_missing_topk(1e-3, "step 1") is None
    with pytest.raises(ParityError, match=r"step 1: 0.002 of the tokens .* --teacher-topk-margin"):
        alarm.judge_missing_topk(2e-3, "step 1")
    assert "0.002" in ParityAlarm(1e-3, "warn").judge_missing_topk(2e-3, "step 1")


# whole runs

RUNS = {**SAVING, "opd": {}, "fkl": {}, "tropd, two updates": {"objective": "tropd", "num_minibatches": 2}}
LAYOUTS = {
    "one rank": (1, {}),
    "TP2, teacher PP2": (2, {"tensor_model_parallel_size": 2, "teacher_pipeline_model_parallel_size": 2}),
    "DP2, teacher TP2": (2, {"teacher_tensor_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The teacher is the student with noise, so that most tokens are accepted."""
    root = make_world(tmp_path_factory.mktemp("world"), kv_heads=4)
    shutil.rmtree(root / "teacher")
    shutil.copytree(root / "student", root / "teacher")
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: tensor * (1 + 0.1 * torch.randn(tensor.shape, generator=generator))
        for name, tensor in read_tensors(root / "teacher").items()
    }
    write_tensors(root / "teacher", noisy)
    return root


def _train_all(argvs):
    return {name: reports_here(argv) for name, argv in argvs.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_runs_have_the_same_bits_with_fewer_bytes(ranks, world, tmp_path, layout, measured):
    size, changes = LAYOUTS[layout]

    def curves(margin):
        argvs = {
            name: flags(world, tmp_path / f"{margin} {name}", train_iters=2, teacher_topk_margin=margin,
                        log_topk_share=0.2, **{"objective": name, **changes, **more})
            for name, more in RUNS.items()
        }  # fmt: skip
        return ranks(size).run(_train_all, argvs)[0]

    saving, whole = curves(-1), curves(0)
    for name in RUNS:
        for mine, theirs in zip(saving[name], whole[name], strict=True):
            assert (mine.loss, mine.grad_norm) == (theirs.loss, theirs.grad_norm), name
            bytes_of = [report.metrics["teacher/payload_bytes_per_token"] for report in (mine, theirs)]
            if name in ("opd", "fkl"):
                assert mine.metrics.keys() == theirs.metrics.keys() and bytes_of[0] == bytes_of[1]
                assert "teacher/topk_missing_frac" not in mine.metrics
            else:
                assert mine.metrics["teacher/topk_missing_frac"] == 0 and bytes_of[0] <= bytes_of[1], name
                if name not in ("eopd", "aopd", "tropd_plus", "tropd_floor"):  # the last three reject every R < 0
                    what = f"bytes of scores by response token, {name}, {layout} (share of all top-k)"
                    measured(what, bytes_of[0] / bytes_of[1], 0.75)
                assert "teacher/topk_missing_frac" not in theirs.metrics


def test_every_method_with_a_teacher_has_its_entropy(ranks, world, tmp_path):
    names = ("opd", "tropd", "eopd", "topk_rkl", "kd", "full_rkl")
    argvs = {name: flags(world, tmp_path / name, objective=name, train_iters=1) for name in names}
    found = {name: report.metrics for name, (report,) in ranks(1).run(_train_all, argvs)[0].items()}
    assert all(found[name]["teacher/entropy"] > 0 for name in names)
    assert found["opd"]["teacher/entropy"] == found["eopd"]["teacher/entropy"], "the same rollouts"


def _with_a_drifted_engine(argv):
    """The message that stops a run whose engine's log-probabilities are all too small by one nat."""
    from megatron_tropd.setup import assemble as setup
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import push_weights, train_step

    assembled = setup.assemble(make_run_spec(parse(argv), 1))
    take = assembled.run.stream.take
    assembled.run.stream.take = lambda *args: [
        replace(rollout, logprobs=tuple(value - 1 for value in rollout.logprobs)) for rollout in take(*args)
    ]
    try:
        push_weights(assembled.run)
        train_step(assembled.run, 0)
    except ParityError as error:
        return str(error)
    finally:
        setup.close(assembled)
    return ""


def test_an_engine_that_drifted_beyond_the_margin_ends_the_run(ranks, world, tmp_path):
    argv = flags(world, tmp_path / "run", guidance="none", parity_limit=100, teacher_topk_margin=1e-3, log_topk_share=0)
    (message,) = ranks(1).run(_with_a_drifted_engine, argv)
    assert "of the tokens are rejected by the gate and have no top-k" in message
    (message,) = ranks(1).run(_with_a_drifted_engine, [*argv, "--teacher-topk-margin", "1.001"])
    assert message == ""
