"""The rollouts that a run shows: what the gate decided about every token, and what is graded."""

from __future__ import annotations

import json
import re

import pytest
import torch

from megatron_tropd import rng
from megatron_tropd.grading.grader import make_grader
from megatron_tropd.reporting.progress.text import step_fields
from megatron_tropd.reporting.report.write import write_report
from megatron_tropd.reporting.rollout_samples import read_samples
from megatron_tropd.reports import StepReport
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
    """Train as the command does; (report, rollouts, trust) of every step."""
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


@pytest.fixture(scope="module")
def expected(ranks, world, tmp_path_factory):
    """The first step of tropd: its trusted share, its samples, and the coins' decisions by transformers in float64.

    A token is rejected where u >= min(q / p, 1) (TrOPD Eq. 6; docs/objectives.md).
    """
    import transformers

    path = tmp_path_factory.mktemp("run")
    ((report, rollouts, _),) = ranks(1).run(_run, _flags(world, path))[0]
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float64).eval()
        for name in ("student", "teacher")
    ]
    key, trusted = rng.key(SEED, rng.Stream.GATE, 0), []
    for rollout in rollouts:
        labels = torch.tensor(rollout.token_ids[rollout.prompt_len :])[:, None]
        with torch.no_grad():
            log_p, log_q = (
                model(torch.tensor([rollout.token_ids])).logits[0, rollout.prompt_len - 1 : -1, :VOCAB]
                .log_softmax(-1).gather(1, labels)[:, 0]
                for model in models
            )  # fmt: skip
        uid = torch.tensor(rng.sample_uid(rollout.prompt_uid, rollout.sample_index))
        coin = rng.uniform(key, uid, torch.arange(len(labels)) + rollout.prompt_len)
        accepted = coin < (log_q - log_p).exp().clamp(max=1)
        trusted.append(accepted[rollout.guidance_len :].tolist())
    return report, trusted, path


def _shown(path, step=1):
    return read_samples(path / f"rollouts/step_{step:07d}.jsonl")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_marks_the_tokens_that_the_coin_rejects(ranks, world, expected, tmp_path, layout):
    _, trusted, _ = expected
    size, changes = LAYOUTS[layout]
    answers = ranks(size).run(_run, _flags(world, tmp_path, **changes))
    report, rollouts, trust = answers[0][0]
    assert {index: [weight == 1 for weight in weights] for index, weights in trust.items()} == dict(enumerate(trusted))
    flat = [accepted for of_rollout in trusted for accepted in of_rollout]
    assert 0 < sum(flat) < len(flat) and any(rollout.guidance_len for rollout in rollouts)
    assert report.metrics["tropd/trusted_frac"] == sum(flat) / len(flat)
    samples = _shown(tmp_path)
    assert [[mark.trusted for mark in sample.tokens] for sample in samples] == trusted
    assert ["".join(mark.text for mark in sample.tokens) for sample in samples] == [s.response for s in samples]
    page = write_report(tmp_path).read_text()
    marked = re.findall(r'<mark class="rejected">([^<]*)</mark>', page)
    of_four = [mark.text for sample in samples[:4] for mark in sample.tokens if not mark.trusted]
    assert marked == ["tokens that the gate rejects", *(text or "[special token]" for text in of_four)] and of_four


@pytest.mark.parametrize(
    ("changes", "gate", "guided"),
    [
        ({"objective": "opd", "guidance": "none"}, False, False),
        ({"objective": "opd"}, False, True),
        ({"objective": "tropd_plus"}, True, True),
        ({"objective": "mask_outlier", "guidance": "none"}, True, False),
    ],
)  # fmt: skip
def test_the_legend_names_what_can_be_seen(ranks, world, tmp_path, changes, gate, guided):
    ranks(1).run(_run, _flags(world, tmp_path, **changes))
    page = write_report(tmp_path).read_text()
    assert ("tokens that the gate rejects" in page) is gate and ("guidance by the teacher" in page) is guided
    assert all((sample.tokens is not None) is gate for sample in _shown(tmp_path))


def test_only_steps_that_are_shown_carry_the_marks(ranks, world, tmp_path):
    steps = ranks(1).run(_run, _flags(world, tmp_path, train_iters=4, rollout_log_interval=3))[0]
    assert [len(trust) for _, _, trust in steps] == [8, 0, 8, 8]
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
    assert not re.search("Rollouts|gate rejects|Response length|by the teacher", page)


def _reader():
    return RolloutReader(
        decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"), prompts={1: Prompt(uid=1, token_ids=(1,), answer="42", name="q-1")},
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
