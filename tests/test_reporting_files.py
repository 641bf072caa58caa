"""Run directory: lines, not-a-numbers, resume, lock, secrets, rollout texts.  Real files, real processes."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import asdict

import pytest
import yaml

from megatron_tropd.reporting import records as lines
from megatron_tropd.reporting.environment import git_state
from megatron_tropd.reporting.redaction import HIDDEN, redact_argv, redact_mapping
from megatron_tropd.reporting.rollout_samples import (
    TOKENS_KEPT,
    RolloutSample,
    TokenText,
    read_samples,
    sample_of,
    token_texts,
)
from megatron_tropd.reporting.run_directory import RunDirectory
from megatron_tropd.reports import EvalReport, StepReport, TokenNumbers
from megatron_tropd.types import Rollout


def step_report(step: int, **changes) -> StepReport:
    fields = {
        "step": step,
        "weight_version": step,
        "loss": 1.0 / step,
        "grad_norm": 0.5,
        "learning_rate": 1e-6,
        "tokens": {"guidance": 10, "on_policy": 90},
        "metrics": {"tropd/trusted_frac": 0.9, "guidance/frac": 0.1},
        "seconds": {"generate": 1.0, "train": 1.5},
        "verdict": "stepped",
    }
    return StepReport(**(fields | changes))


def eval_report(
    step: int, accuracy: float = 0.5, decoding: str = "greedy", *, num_samples: int = 1, **changes
) -> EvalReport:
    return EvalReport(
        step=step, decoding=decoding, accuracy=accuracy, std_error=0.05, num_prompts=100, num_samples=num_samples,
        mean_response_len=20.0, finished=0.9, **changes,
    )  # fmt: skip


def create(path, *, resume=False, **config) -> RunDirectory:
    return RunDirectory.create(path, config=config, resume=resume)


def steps_in(path) -> list[int]:
    return [record["step"] for record in lines.read_records(path / "metrics.jsonl")]


def test_lines_are_valid_json_and_come_back(tmp_path):
    with create(tmp_path) as run:
        written = run.step(step_report(1)), run.evaluation(eval_report(1))
        # Flushed: another process sees a line as soon as it is written.
        assert lines.read_records(tmp_path / "metrics.jsonl") == list(written)


def test_not_a_number_is_null_with_a_note(tmp_path):
    report = step_report(3, loss=math.nan, grad_norm=math.inf, metrics={"a/b.c": -math.inf, "a/d": 1.0})
    with create(tmp_path) as run:
        run.step(report)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert strict["loss"] is None and strict["metrics"] == {"a/b.c": None, "a/d": 1.0}
    assert strict["nonfinite"] == {"loss": "nan", "grad_norm": "inf", "metrics.a/b.c": "-inf"}
    (back,) = lines.read_records(tmp_path / "metrics.jsonl")
    assert math.isnan(back["loss"]) and back["grad_norm"] == math.inf and back["metrics"]["a/b.c"] == -math.inf
    assert "nonfinite" not in back


def test_resume_drops_later_steps_and_a_cut_line(tmp_path):
    with create(tmp_path) as run:
        for step in range(1, 6):
            run.step(step_report(step))
            run.rollouts(step, [])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "step", "step": 6, "lo')
    with create(tmp_path, resume=True) as run:
        assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
        assert run.rewind(3) == 2
        run.step(step_report(4, loss=9.0))
    records = lines.read_records(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4] and records[-1]["loss"] == 9.0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        f"step_000000{step}.jsonl" for step in (1, 2, 3)
    ]
    assert not list(tmp_path.glob(".*tmp"))


DAMAGED = [
    "[1]", "[" * 100_000, '{"kind": "step"}', '{"kind": "step", "step": "x"}', '{"kind": [], "step": 1}',
    '{"kind": "eval", "step": 1, "decoding": {}}', '{"kind": "step", "step": 1, "nonfinite": [0]}',
    '{"kind": "step", "step": 1, "nonfinite": {"loss": null}}', '{"kind": "step", "st',
]  # fmt: skip


def test_damaged_lines_are_left_out_and_told(tmp_path):
    whole = ['{"kind": "step", "step": 1}', '{"kind": "step", "step": 2}', '{"kind": "step", "step": 1, "loss": 2.0}']
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join([*whole, *DAMAGED]))
    records, damaged = lines.scan_records(path)
    assert records == lines.read_records(path) == [json.loads(line) for line in whole[1:]], "the last of a step counts"
    assert damaged == list(range(4, 4 + len(DAMAGED)))
    assert lines.scan_records(path, lambda record: "loss" in record)[1] == [1, 2, *damaged]
    assert lines.drop_after(path, 1) == len(DAMAGED) + 1 and path.read_text().splitlines() == whole[::2]
    assert lines.scan_records(tmp_path / "none") == ([], [])


def test_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}')
    assert lines.drop_after(path, None) == 0
    assert path.read_text().endswith('"step": 2}\n')


def test_a_finished_run_is_not_started_over(tmp_path):
    with create(tmp_path) as run:
        run.step(step_report(1))
    (tmp_path / "hf_export").mkdir()
    (tmp_path / "hf_export/config.json").write_text("{}")
    with pytest.raises(ValueError, match="already holds a run that was finished, but not its checkpoints"):
        create(tmp_path)
    create(tmp_path, resume=True).close()  # the refusal gave the lock back
    assert steps_in(tmp_path) == [1]


def test_a_launch_without_a_checkpoint_moves_the_log_of_the_one_before_aside(tmp_path):
    for number, seed in enumerate((7, 8, 9)):
        with create(tmp_path, seed=seed) as run:
            assert steps_in(tmp_path) == [] and not list((tmp_path / "rollouts").iterdir())
            assert (run.moved_aside.name if run.moved_aside else None) == (f"interrupted_{number}" if number else None)
            run.step(step_report(1, loss=float(seed)))
            run.rollouts(1, [])
    for number, seed in ((1, 7), (2, 8)):
        aside = tmp_path / f"interrupted_{number}"
        assert steps_in(aside) == [1] and lines.read_records(aside / "metrics.jsonl")[0]["loss"] == seed
        assert [path.name for path in (aside / "rollouts").iterdir()] == ["step_0000001.jsonl"]
        assert yaml.safe_load((aside / "config.yaml").read_text()) == {"seed": seed}
    assert steps_in(tmp_path) == [1]
    (tmp_path / "metrics.jsonl").write_text('{"kind": "st')  # it ended before its first step
    with create(tmp_path) as run:
        assert run.moved_aside is None and steps_in(tmp_path) == []


def test_config_and_environment(tmp_path):
    config = {"lr": 1e-6, "clip-grad": float("inf"), "load": tmp_path, "wandb-api-key": "abc", "seed": 1}
    defaults = config | {"lr": 1e-5, "clip-grad": 1.0}
    RunDirectory.create(tmp_path, config=config, resume=False, defaults=defaults).close()
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == config | {"load": str(tmp_path), "wandb-api-key": HIDDEN}
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["changed_flags"] == {"lr": 1e-6, "clip-grad": "inf"}
    assert environment["packages"]["torch"] and environment["cpu_count"] >= 1
    create(tmp_path, resume=True, lr=2e-6).close()
    assert yaml.safe_load((tmp_path / "config.before_1.yaml").read_text()) == written
    assert len(json.loads((tmp_path / "env.json").read_text())["earlier_launches"]) == 1


def test_git_state_is_of_the_code_and_not_of_what_surrounds_it(tmp_path):
    assert git_state(tmp_path) is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert git_state(tmp_path) is None  # inside a repository that does not track it
    (tmp_path / "a").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, "add", "a"], check=True)
    subprocess.run(["git", "-C", tmp_path, *identity, "commit", "-qm", "a"], check=True)
    state = git_state(tmp_path)
    assert len(state["sha"]) == 40 and state["dirty"] is False


def test_secrets_are_hidden():
    argv = ["train.py", "--hf-token", "hunter2", "--api-key=x", "--max-tokens-per-batch", "4096", "--lr", "1e-6"]
    argv += ["WANDB_API_KEY=y", "--tokenizer-model", "a/b", "--input-key", "prompt", "https://me:pw@host/x"]
    shown = redact_argv(argv)
    assert not {"hunter2", "--api-key=x", "WANDB_API_KEY=y"} & set(shown) and "pw" not in " ".join(shown)
    assert {"4096", "1e-6", "a/b", "prompt", "--hf-token", f"--api-key={HIDDEN}"} <= set(shown)
    assert redact_mapping({"HF_TOKEN": "a", "a": {"password": ["b"]}, "eos_token_id": 2}) == {
        "HF_TOKEN": HIDDEN,
        "a": {"password": [HIDDEN]},
        "eos_token_id": 2,
    }


def _numbers(num_tokens, **changes):
    """Numbers of tokens that the student wrote, all alike."""
    one = {"region": "on_policy", "student_logprob": -1.0, "teacher_logprob": -2.0, "reward": -1.0, "trust": 1.0,
           "coin": 0.25, "teacher_entropy": 0.5, "teacher_top": ((98, -0.5), (0, -1.0))} | changes  # fmt: skip
    return TokenNumbers(**{name: (value,) * num_tokens for name, value in one.items()})


def _utf8():
    return TokenText(
        decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
        name=lambda token: bytes([token]).decode("utf-8", errors="replace"),
    )


def _rollout(guidance, written):
    return Rollout(
        prompt_uid=1, sample_index=0, token_ids=(*b"hi", *guidance, *written), prompt_len=2, guidance_len=len(guidance),
        logprobs=(0.0,) * len(written), weight_version=(0, 0), finish="length",
    )  # fmt: skip


def test_rollouts_come_back(tmp_path):
    excluded = _numbers(2, teacher_logprob=-math.inf, reward=-math.inf, coin=None, teacher_top=())
    samples = [
        sample_of(_rollout(b"", "\u20ac".encode()), _utf8(), numbers=_numbers(3), correct=True, name="q"),
        sample_of(_rollout(b"", b"42"), _utf8(), numbers=excluded),
        sample_of(_rollout(b"", b""), _utf8(), numbers=_numbers(0)),
        RolloutSample(uid=5, sample_index=1, prompt="p\n", guidance="", response="2\ud800", finish="stop"),
    ]
    with create(tmp_path) as run:
        path = run.rollouts(10, samples)
    assert path.name == "step_0000010.jsonl"
    assert read_samples(path) == samples
    assert samples[1].tokens.reward == ("-inf", "-inf") and samples[1].tokens.coin == (None, None)


def test_marks_of_earlier_versions_are_read_as_text(tmp_path):
    line = {"uid": 5, "sample_index": 1, "prompt": "p", "guidance": "", "response": "42", "finish": "stop",
            "correct": None, "name": "", "tokens": [{"text": "42", "trusted": True}]}  # fmt: skip
    (tmp_path / "old.jsonl").write_text(json.dumps(line))
    (sample,) = read_samples(tmp_path / "old.jsonl")
    assert sample.response == "42" and sample.tokens is None and sample.trusted_share is None


def test_each_token_has_its_numbers_and_its_part_of_the_text():
    written = list("a\u20acb".encode())
    rollout = _rollout(b"G", written)
    sample = sample_of(rollout, _utf8(), numbers=_numbers(6, trust=0.25))
    assert (sample.prompt, sample.guidance, sample.response, sample.num_tokens) == ("hi", "G", "a\u20acb", 6)
    assert sample.tokens.ids == (*b"G", *written) and sample.trusted_share == 0.25
    assert sample.tokens.texts == ("G", "a", "", "", "\u20ac", "b")
    # every id is named, also those of the teacher's top; a byte of a character has no text of its own
    assert sample.tokens.names == {str(i): bytes([i]).decode(errors="replace") for i in {*b"G", *written, 98, 0}}
    with pytest.raises(ValueError, match="numbers of 3 tokens for 6 response tokens"):
        sample_of(rollout, _utf8(), numbers=_numbers(3))


def test_numbers_of_a_long_response_are_bounded_and_its_text_is_whole():
    sample = sample_of(_rollout(b"", b"x" * (TOKENS_KEPT + 9)), _utf8(), numbers=_numbers(TOKENS_KEPT + 9))
    columns = {name: column for name, column in asdict(sample.tokens).items() if name != "names"}
    assert {len(column) for column in columns.values()} == {TOKENS_KEPT}
    assert (len(sample.response), sample.num_tokens) == (TOKENS_KEPT + 9, TOKENS_KEPT + 9)


def test_special_tokens_and_bytes_that_are_no_text_keep_their_place():
    """Words are joined by a space, and token 0 is special; the texts of the tokens make up the whole text."""

    def words(ids):
        return " ".join(f"w{i}" for i in ids if i)

    assert token_texts([0, 3, 0, 0, 4, 0], words) == ["", "w3", "", "", " w4", ""]
    lengths = []

    def letters(ids):
        lengths.append(len(ids))
        return bytes(ids).decode("utf-8", errors="replace")

    texts = token_texts([0x80] * 1000, letters)
    assert len(texts) == 1000 and "".join(texts) == "\ufffd" * 1000 and max(lengths) <= 8
