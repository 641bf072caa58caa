"""The rollouts that a run shows: what the loss read at every token, and what is graded."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

import pytest
import torch

from megatron_tropd import rng
from megatron_tropd.grading.grader import make_grader
from megatron_tropd.reporting.progress.text import step_fields
from megatron_tropd.reporting.report.write import write_report
from megatron_tropd.reporting.rollout_samples import TokenText, read_samples
from megatron_tropd.reports import StepReport, TokenNumbers
from megatron_tropd.training.run_logger import RolloutReader
from megatron_tropd.types import Prompt, Rollout
from tests.tiny_run import flags, make_world

SEED, VOCAB, GUIDANCE_STEPS = 7, 131, 3
# ranks, and flags; teacher layouts and micro-batches differ, so that rollouts are packed in another order
LAYOUTS = {
    "one rank": (1, {}),
    "small micro-batches": (1, {"max_tokens_per_microbatch": 21}),
    "TP2": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "DP2": (2, {"teacher_tensor_model_parallel_size": 2, "max_tokens_per_microbatch": 30}),
    "PP2": (2, {"pipeline_model_parallel_size": 2, "head_mode": "recompute"}),
    "CP2": (2, {"context_parallel_size": 2, "max_tokens_per_microbatch": 30}),
    "two minibatches": (1, {"num_minibatches": 2}),
}


def _run(argv):
    """Train as the command does; (report, rollouts, numbers of the tokens) of every step."""
    import torch.distributed as dist

    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training import loop

    assembled = assemble(make_run_spec(parse(argv), dist.get_world_size()))
    seen, log = [], assembled.run.logger.step
    assembled.run.logger.step = lambda *step: (seen.append(step), log(*step))
    try:
        loop.train(assembled.run, assembled.start_step)
    finally:
        close(assembled)
    return seen


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _flags(world, path, **changes):
    """Eight rollouts in a step, which is as many as are shown."""
    settings = {
        "guidance": "ratio",
        "guidance_schedule": "linear",
        "guidance_steps": GUIDANCE_STEPS,
        "train_iters": 1,
        "seed": SEED,
    }
    return flags(world, path, **{**settings, **changes})


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """One rollout's response tokens by transformers in float64."""

    log_p: torch.Tensor  # [R]
    log_q: torch.Tensor  # [R]
    distribution: torch.Tensor  # [R, V] log-probabilities of the teacher
    coin: torch.Tensor  # [R]


@pytest.fixture(scope="module")
def expected(ranks, world, tmp_path_factory):
    """The rollouts of the first step of tropd, what transformers say of them, and the numbers that one rank wrote."""
    import transformers

    path = tmp_path_factory.mktemp("run")
    ((_, rollouts, numbers),) = ranks(1).run(_run, _flags(world, path))[0]
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float64).eval()
        for name in ("student", "teacher")
    )
    key, found = rng.key(SEED, rng.Stream.GATE, 0), []
    for rollout in rollouts:
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])[:, None]
        with torch.no_grad():
            log_p, log_q = (
                model(torch.tensor([rollout.token_ids])).logits[0, rollout.prompt_len - 1 : -1, :VOCAB].log_softmax(-1)
                for model in (student, teacher)
            )
        uid = torch.tensor(rng.sample_uid(rollout.prompt_uid, rollout.sample_index))
        coin = rng.uniform(key, uid, torch.arange(len(labels)) + rollout.prompt_len)
        log_p, at_label = log_p.gather(1, labels)[:, 0], log_q.gather(1, labels)[:, 0]
        found.append(Expected(log_p=log_p, log_q=at_label, distribution=log_q, coin=coin))
    return rollouts, found, numbers


def _shown(path, step=1):
    return read_samples(path / f"rollouts/step_{step:07d}.jsonl")


def _close(mine, theirs):
    torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), theirs, rtol=0, atol=2e-4)


def _check_numbers(rollout, of, numbers, *, before_updates):
    """Every number of one rollout against transformers, and the gate's decisions against the paper's rule.

    A token is accepted where log u < R, so with probability min(q / p, 1) (TrOPD Eq. 6; docs/objectives.md).
    """
    given = rollout.guidance_len
    region = "guidance_copy" if rollout.sample_index else "guidance"
    assert numbers.region == (region,) * given + ("on_policy",) * len(rollout.logprobs)
    for column in (numbers.reward, numbers.trust, numbers.coin, numbers.teacher_entropy):
        assert all(value is None for value in column[:given]) and None not in column[given:]
    _close(numbers.teacher_logprob, of.log_q)
    _close(numbers.student_logprob[given:], of.log_p[given:])
    if region == "guidance_copy":
        assert all(value is None for value in numbers.student_logprob[:given])
    elif before_updates:
        _close(numbers.student_logprob[:given], of.log_p[:given])
    probabilities = of.distribution.exp()
    _close(numbers.teacher_entropy[given:], -(probabilities * of.distribution).sum(-1)[given:])
    assert numbers.coin[given:] == tuple(of.coin[given:].tolist())
    mine, theirs = (torch.tensor(column[given:]) for column in (numbers.teacher_logprob, numbers.student_logprob))
    assert numbers.reward[given:] == tuple((mine - theirs).tolist()), "R is the difference that the loss made, in fp32"
    accepted = of.coin < (of.log_q - of.log_p).exp().clamp(max=1)
    assert numbers.trust[given:] == tuple(accepted[given:].double().tolist())
    for place, top in enumerate(numbers.teacher_top):
        best = of.distribution[place].topk(5)
        assert top or place < given or accepted[place], "the loss of a rejected token reads the teacher's top-k"
        if top:
            assert [token for token, _ in top] == best.indices.tolist()
            _close([logprob for _, logprob in top], best.values)
    return accepted[given:].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_samples_hold_what_the_loss_read(ranks, world, expected, tmp_path, layout):
    rollouts, found, of_one_rank = expected
    size, changes = LAYOUTS[layout]
    everyone = ranks(size).run(_run, _flags(world, tmp_path, **changes))
    report, mine, numbers = everyone[0][0]
    assert [rollout.token_ids for rollout in mine] == [rollout.token_ids for rollout in rollouts]
    assert list(numbers) == list(range(len(rollouts))) and all(not others for ((_, _, others),) in everyone[1:])
    before = "num_minibatches" not in changes
    accepted = [_check_numbers(r, found[i], numbers[i], before_updates=before) for i, r in enumerate(rollouts)]
    flat = [one for of_rollout in accepted for one in of_rollout]
    assert 0 < sum(flat) < len(flat) and any(rollout.guidance_len for rollout in rollouts)
    assert report.metrics["tropd/trusted_frac"] == sum(flat) / len(flat)
    for index, theirs in of_one_rank.items():
        assert (numbers[index].region, numbers[index].coin, numbers[index].trust) == (
            theirs.region,
            theirs.coin,
            theirs.trust,
        )
    samples = _shown(tmp_path)
    assert [sample.tokens.trust for sample in samples] == [numbers[index].trust for index in numbers]
    assert ["".join(sample.tokens.texts) for sample in samples] == [s.guidance + s.response for s in samples]
    for sample, rollout in zip(samples, rollouts, strict=True):
        assert sample.tokens.ids == rollout.token_ids[rollout.prompt_len :]
        assert all(sample.tokens.names[str(token)] for token in sample.tokens.ids)


METHODS = {  # (flags, columns without a number, weights of the gate that are between 0 and 1)
    "opd": ({"objective": "opd"}, {"trust", "coin", "teacher_top"}, False),
    "threshold": ({"objective": "mask_outlier", "guidance": "none"}, {"coin", "teacher_top"}, False),
    "expected": ({"objective": "tropd", "gate": "expected"}, {"coin"}, True),
    "the student's top-k": ({"objective": "topk_rkl", "guidance": "none"}, {"trust", "coin", "teacher_top"}, False),
    "no teacher": (
        {"objective": "grpo", "guidance": "none", "reward_function": "megatron_tropd.grading.rewards:exact_match"},
        {"teacher_logprob", "reward", "trust", "coin", "teacher_top", "teacher_entropy"}, False,
    ),
    "from the engine": ({"objective": "tropd", "reward_logprob": "rollout"}, set(), False),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_a_number_that_a_method_has_not_is_absent(ranks, world, tmp_path, name):
    changes, absent, fractional = METHODS[name]
    ((_, rollouts, numbers),) = ranks(1).run(_run, _flags(world, tmp_path, **changes))[0]
    columns = {
        column: [value for of in numbers.values() for value in getattr(of, column) if value not in (None, ())]
        for column in TokenNumbers.__dataclass_fields__
    }
    assert {column for column, values in columns.items() if not values} == absent
    assert any(0 < weight < 1 for weight in columns["trust"]) is fractional
    if name == "expected":
        for of in numbers.values():
            pairs = [(r, w) for r, w in zip(of.reward, of.trust, strict=True) if r is not None]
            assert [w for _, w in pairs] == pytest.approx([min(1, math.exp(r)) for r, _ in pairs], abs=1e-6)
    if name == "from the engine":
        for index, rollout in enumerate(rollouts):
            engine = torch.tensor(rollout.logprobs).tolist()
            assert list(numbers[index].student_logprob[rollout.guidance_len :]) == engine


def test_only_steps_that_are_shown_carry_numbers(ranks, world, tmp_path):
    steps = ranks(1).run(_run, _flags(world, tmp_path, train_iters=4, rollout_log_interval=3))[0]
    assert [len(numbers) for _, _, numbers in steps] == [8, 0, 8, 8]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        f"step_000000{n}.jsonl" for n in (1, 3, 4)
    ]


def test_finetuning_claims_nothing_about_rollouts(ranks, world, tmp_path):
    """The responses are those of the data: nothing about them is graded, sampled or measured as the student's."""
    argv = _flags(world, tmp_path, objective="sft", guidance="auto", answer_pattern=r"(w\d+)", train_iters=2)
    ranks(1).run(_run, argv)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 2
    for record in records:
        names = record["metrics"].keys()
        assert "tropd/guidance_nll" in names and not [n for n in names if n.startswith(("rollout/", "guidance/"))]
        line = step_fields(StepReport(**{name: value for name, value in record.items() if name != "kind"}))
        assert "loss" in line and not line.keys() & {"rollouts right", "guidance", "trusted"}
    assert not list((tmp_path / "rollouts").iterdir())
    page = write_report(tmp_path).read_text()
    assert not re.search("Rollouts|<script|Response length|by the teacher", page)


def _reader():
    return RolloutReader(
        text=TokenText(decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"), name=chr),
        prompts={1: Prompt(uid=1, token_ids=(1,), answer="42", name="q-1")},
        grader=make_grader("exact", r"# (\S+)"),
    )  # fmt: skip


def _rollout(guidance, written, *, uid=1, finish="stop"):
    ids = (*b"p", *guidance, *written)
    return Rollout(prompt_uid=uid, sample_index=0, token_ids=ids, prompt_len=1, guidance_len=len(guidance),
                   logprobs=(0.0,) * len(written), weight_version=(0, 0), finish=finish)  # fmt: skip


@pytest.mark.parametrize(
    ("rollout", "correct"),
    [
        (_rollout(b"", b"so # 42"), True),
        (_rollout(b"", b"so # 41"), False),
        (_rollout(b"so ", b"# 42"), True),
        (_rollout(b"so # ", b"42"), True),
        (_rollout(b"# 7 ", b"no, # 42"), True),
        (_rollout(b"so # 4", b"2"), None),
        (_rollout(b"so # 42", b" ."), None),
        (_rollout(b"# 42 ", b"no, # 41"), False),
        (_rollout("\u20ac # ".encode() + b"\xe2", b"\x82\xac"), False),
        (_rollout(b"so ", b"what"), False),
        (_rollout(b"so ", b"# 42", finish="length"), False),
        (_rollout(b"so # 42", b""), None),
        (_rollout(b"", b"# 42", uid=2), None),
    ],
)
def test_only_an_answer_of_the_student_is_graded(rollout, correct):
    assert _reader().correct([rollout]) == [correct]
