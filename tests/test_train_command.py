"""The command as a user meets it: every mistake is one clear message before any model is built."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import get_args, get_type_hints

import psutil
import pytest

from megatron_tropd.cli import ConfigError, changed_flags, make_parser, parse, to_flags
from megatron_tropd.config import EngineConfig, TrainConfig
from megatron_tropd.setup.engines import ENGINES
from megatron_tropd.setup.run_spec import make_run_spec
from tests.hf_models import edit_config, save_hf_checkpoint
from tests.tiny_run import flags, make_world
from tests.torchrun_jobs import output_of, start, wait_for_steps

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def _complaint(argv, world_size=1):
    with pytest.raises(ConfigError) as caught:
        make_run_spec(parse(argv), world_size)
    return str(caught.value)


def test_a_good_configuration_passes(world, tmp_path):
    spec = make_run_spec(parse(flags(world, tmp_path / "run")), 2)
    assert spec.models.student_layout.dp == 2 and len(spec.data.prompts) == 24


@pytest.mark.parametrize(
    ("changes", "world_size", "expected"),
    [
        ({"tensor_model_parallel_size": 3}, 3, r"--tensor-model-parallel-size 3 does not divide the model's 8 attention heads"),
        ({"pipeline_model_parallel_size": 3}, 3, r"--pipeline-model-parallel-size 3 does not divide the model's 2 layers"),
        ({"tensor_model_parallel_size": 2}, 3, r"does not divide the 3 ranks torchrun started"),
        ({"teacher_tensor_model_parallel_size": 8}, 8, r"teacher: --teacher-tensor-model-parallel-size 8 does not divide the model's 4 key/value heads"),
        ({"top_k": 500}, 1, r"--top-k 500 is larger than the common vocabulary of 131"),
        ({"objective": "trpo"}, 1, r"--objective 'trpo' is not known; choose one of opd, fkl, .*, grpo"),
        ({"max_response_length": 900}, 1, r"do not fit --max-tokens-per-microbatch 48"),
        ({"max_response_length": 400, "max_tokens_per_microbatch": 999}, 1, r"exceed the student's max_position_embeddings 256"),
        ({"max_prompt_length": 2}, 1, r"train\.jsonl:2: .*3 tokens.*--max-prompt-length"),
        ({"lr": -1.0}, 1, r"--lr -1.0 must be positive"),
        ({"run_dir": None}, 1, r"--run-dir is missing"),
        ({"hf_checkpoint": None}, 1, r"the student is missing: give --hf-checkpoint DIR or --pretrained-checkpoint DIR"),
        ({"hf_checkpoint": "/nowhere"}, 1, r"student \(--hf-checkpoint\): /nowhere/config.json does not exist"),
        ({"prompt_data": "/nowhere.jsonl"}, 1, r"/nowhere\.jsonl"),
        ({"answer_pattern": "(("}, 1, r"--answer-pattern '\(\(' is not a regular expression"),
        ({"answer_pattern": "abc"}, 1, r"--answer-pattern 'abc' has no group; put the answer in parentheses"),
        ({"grader": "maths"}, 1, r"--grader: 'maths' is not one of exact, math"),
        ({"response_key": "nothing"}, 1, r"--guidance ratio needs teacher responses"),
        ({"eval_data": "/nowhere.jsonl"}, 1, r"/nowhere\.jsonl: no such file.*see --eval-data"),
        ({"distributed_timeout_minutes": 0}, 1, r"--distributed-timeout-minutes 0.0 must be positive"),
        ({"num_minibatches": 3}, 1, r"--num-minibatches 3 does not divide the --rollout-batch-size 4 prompts"),
        ({"num_minibatches": 0}, 1, r"--num-minibatches 0 must be at least 1"),
        ({"lr_warmup_iters": 5}, 1, r"--lr-warmup-iters 5 is above the 4 updates of the run"),
        ({"objective": "grpo"}, 1, r"--objective grpo learns from rewards: give --reward-function package\.module:function"),
        ({"objective": "grpo", "reward_function": "nonsense"}, 1, r"--reward-function nonsense: expected package\.module:function"),
        ({"objective": "grpo", "reward_function": "no.such:f"}, 1, r"importing no\.such failed: ModuleNotFoundError"),
        ({"objective": "grpo", "reward_function": "tests.reward_functions:a_number"}, 1, r"'a_number' is a int, not a function"),
        ({"objective": "grpo", "reward_function": "tests.reward_functions:gone"}, 1, r"'gone' is not there"),
        ({"objective": "grpo", "reward_function": "megatron_tropd.grading.rewards:exact_match", "answer_key": "none"}, 1,
         r"exact_match: 24 rows have no 'none' \(--answer-key\)"),
        ({"objective": "grpo", "n_samples_per_prompt": 1, "reward_function": "tests.reward_functions:same_for_all"}, 1,
         r"--n-samples-per-prompt 1 must be at least 2"),
        ({"objective": "sft", "guidance": "ratio"}, 1, r"--objective sft .*writes nothing: --guidance ratio has no meaning"),
        ({"objective": "sft", "response_key": "nothing"}, 1, r"24 of 24 rows of --prompt-data have no 'nothing' \(--response-key\)"),
        ({"objective": "sft", "max_prompt_length": 36}, 1, r"36 \+ --max-response-length 12 \+ 1 \(the stop token\) = 49 tokens"),
        ({"objective": "gopd", "reference_hf_checkpoint": "/nowhere"}, 1, r"reference \(--reference-hf-checkpoint\): /nowhere"),
        ({"objective": "opd", "teacher_hf_checkpoint": None}, 1, r"the teacher is missing: give --teacher-hf-checkpoint DIR"),
        ({"objective": "opd", "log_topk_overlap": True}, 1, r"--log-topk-overlap compares with the teacher's top-k, which --objective opd"),
        ({"gradient_diagnostics_interval": -1}, 1, r"--gradient-diagnostics-interval -1 must not be negative"),
        ({"wandb_project": "p"}, 1, r"--wandb-project p needs the package wandb"),
    ],
)  # fmt: skip
def test_each_mistake_has_a_message(world, tmp_path, changes, world_size, expected):
    assert re.search(expected, _complaint(flags(world, tmp_path / "run", **changes), world_size), re.DOTALL)


def test_answers_that_no_response_can_give(world, tmp_path):
    """Supervised finetuning does not read the answers of the data that it learns from."""
    rows = [{**json.loads(row), "answer": " "} for row in (world / "train.jsonl").read_text().splitlines()]
    data = tmp_path / "blank.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = flags(world, tmp_path / "run", prompt_data=data, eval_data=data)
    complaint = _complaint(argv)
    for flag in ("--prompt-data", "--eval-data"):
        assert f"{flag}: a reference answer is blank" in complaint and "(24 rows, first: uid 0)" in complaint
    assert make_run_spec(parse(flags(world, tmp_path / "run", prompt_data=data, objective="sft")), 1)


@pytest.mark.parametrize("objective", ["sft", "grpo"])
def test_a_method_without_a_teacher_needs_none(world, tmp_path, objective):
    changes = {"objective": objective, "reward_function": "megatron_tropd.grading.rewards:exact_match"}
    spec = make_run_spec(parse(flags(world, tmp_path / "run", teacher_hf_checkpoint=None, **changes)), 2)
    assert not spec.models.teachers and spec.models.reference is None
    assert spec.tokens.common_vocab_size == spec.tokens.student_vocab_size


def test_what_a_method_leaves_aside_is_a_warning(world, tmp_path):
    argv = flags(world, tmp_path / "run", objective="sft", reference_load="X", reward_function="no.such:f")
    warnings = " ".join(make_run_spec(parse(argv), 1).warnings)
    for flag in ("--teacher-hf-checkpoint", "--reference-load X", "--reward-function no.such:f"):
        assert f"--objective sft does not use {flag}" in warnings


def test_a_reference_with_another_tokenizer(world, tmp_path):
    def change(w):
        path = w / "teacher" / "tokenizer.json"
        path.write_text(path.read_text().replace('"w10"', '"other"'))

    other = _corrupt(world, tmp_path, change) / "teacher"
    text = _complaint(flags(world, tmp_path / "r", objective="gopd", reference_hf_checkpoint=other))
    assert "choose a reference with the student's tokenizer" in text and "--reference-hf-checkpoint" in text


@pytest.mark.fault(number=29)
def test_all_mistakes_come_in_one_message(world, tmp_path):
    text = _complaint(flags(world, tmp_path / "run", lr=0, top_k=0, objective="x", tensor_model_parallel_size=5), 5)
    for flag in ("--lr", "--top-k 0", "--objective", "--tensor-model-parallel-size 5"):
        assert flag in text
    assert text.startswith(f"{text.count(chr(10) + '  - ')} configuration errors:")


def test_all_values_of_a_wrong_type_come_in_one_message(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("save:\nprompt-data:\ntop-k: many\n")
    with pytest.raises(ConfigError) as caught:
        parse(["--config", str(config), "--lr", "fast", "--gate", "maybe", "--train-iters", "1.5", "--nonsense", "1"])
    text = str(caught.value)
    assert text.startswith("7 configuration errors:")
    for complaint in (
        "save: has no value", "prompt-data: has no value", "top-k: 'many' is not an integer", "--lr: 'fast' is not a number",
        "--gate: 'maybe' is not one of bernoulli", "--train-iters: '1.5' is not an integer", "unknown flag --nonsense",
    ):  # fmt: skip
        assert complaint in text


@pytest.mark.fault(number=29)
def test_unknown_flags_and_keys_suggest_the_right_one(world, tmp_path):
    with pytest.raises(ConfigError, match=r"unknown flag --train-iter; did you mean --train-iters\?"):
        parse([*flags(world, tmp_path / "run"), "--train-iter", "3"])
    config = tmp_path / "c.yaml"
    config.write_text("learning_rate: 1\ntop_kk: 4\nlr: fast\nbf16: maybe\n")
    with pytest.raises(ConfigError) as caught:
        parse(["--config", str(config)])
    text = str(caught.value)
    assert "learning-rate" in text and "did you mean top-k?" in text
    assert "lr: 'fast' is not a number" in text and "bf16: 'maybe' is not true or false" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [("[1, 2]", "expected a mapping"), ("a: [", "not valid YAML"), (None, "No such file")],
)
def test_unreadable_config_files(tmp_path, content, expected):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=expected):
        parse(["--config", str(path)])


def test_flags_override_yaml_and_numbers_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("lr: 5e-6\ntrain-iters: 7\ntop_k: 3\nsequence-parallel: true\nprompt-data: [a.jsonl, b.jsonl]\n")
    config = parse(["--config", str(path), "--train-iters", "9", "--no-sequence-parallel"])
    assert (config.training.lr, config.training.train_iters, config.method.top_k) == (5e-6, 9, 3)
    assert config.parallel.sequence_parallel is False and config.data.prompt_data == ["a.jsonl", "b.jsonl"]
    assert changed_flags(config) == {"train-iters": 9, "top-k": 3, "prompt-data": ["a.jsonl", "b.jsonl"]}


def test_the_resolved_configuration_reads_back(tmp_path, world):
    import yaml

    config = parse(flags(world, tmp_path / "run"))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_flags(config)))
    assert parse(["--config", str(tmp_path / "c.yaml")]) == config


def test_every_flag_is_listed_with_its_default():
    text = make_parser().format_help()
    for name in to_flags(TrainConfig()):
        assert f"--{name}" in text


def _corrupt(world, tmp_path, change):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    change(copy)
    return copy


@pytest.mark.fault(number=25)
def test_empty_prompt_file(world, tmp_path):
    broken = _corrupt(world, tmp_path, lambda w: (w / "train.jsonl").write_text(""))
    assert re.search(
        r"train\.jsonl.*no prompts|no prompts.*train\.jsonl|empty", _complaint(flags(broken, tmp_path / "r"))
    )


def test_broken_json_line_is_named(world, tmp_path):
    def change(w):
        lines = (w / "train.jsonl").read_text().splitlines()
        lines[4] = lines[4][:-3]
        (w / "train.jsonl").write_text("\n".join(lines) + "\n")

    assert "train.jsonl:5:" in _complaint(flags(_corrupt(world, tmp_path, change), tmp_path / "r"))


@pytest.mark.fault(number=24)
def test_teacher_with_another_tokenizer(world, tmp_path):
    def change(w):
        path = w / "teacher" / "tokenizer.json"
        path.write_text(path.read_text().replace('"w10"', '"other"'))

    text = _complaint(flags(_corrupt(world, tmp_path, change), tmp_path / "r"))
    assert "other" in text and "w10" in text and "--teacher-hf-checkpoint" in text


def test_missing_and_truncated_safetensors(world, tmp_path):
    def truncate(w):
        path = w / "student" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    truncated = _corrupt(world, tmp_path / "a", truncate)
    text = _complaint(flags(truncated, tmp_path / "r"))
    assert "model.safetensors" in text and "bytes" in text
    missing = _corrupt(world, tmp_path / "b", lambda w: (w / "teacher" / "model.safetensors").unlink())
    assert "teacher (--teacher-hf-checkpoint)" in _complaint(flags(missing, tmp_path / "r"))


def test_an_architecture_we_cannot_build(world, tmp_path):
    broken = _corrupt(world, tmp_path, lambda w: edit_config(w / "teacher", model_type="mamba"))
    assert "model_type 'mamba'; supported are llama, mistral, qwen2, qwen3" in _complaint(flags(broken, tmp_path / "r"))


def test_a_checkpoint_of_another_architecture(ranks, world, tmp_path):
    from tests.test_training_resume import _train

    ranks(1).run(_train, flags(world, tmp_path / "run", train_iters=1))
    other = save_hf_checkpoint(tmp_path / "other", "qwen3", num_hidden_layers=2, intermediate_size=64)
    for flag in ("pretrained_checkpoint", "load"):
        argv = flags(world, tmp_path / "r2", hf_checkpoint=other, **{flag: tmp_path / "run/checkpoints"})
        assert "another architecture" in _complaint(argv)


def test_converted_weights_are_not_a_run_to_go_on_with(world, tmp_path):
    """They would be left aside in silence, and the run start from --hf-checkpoint."""
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert "--pretrained-checkpoint" in _complaint(flags(world, tmp_path / "r", load=tmp_path))


@pytest.mark.fault(number=1)
def test_killing_a_rank_ends_the_job_and_the_same_command_resumes(world, tmp_path, seen):
    """SIGKILL of one rank in the middle of a step: all end within a minute, the run goes on afterwards."""
    run_dir = tmp_path / "run"
    argv = flags(world, run_dir, train_iters=60, tensor_model_parallel_size=2, save_interval=5)
    with start(argv, tmp_path) as job:
        steps = wait_for_steps(run_dir / "metrics.jsonl", 8, job)
        psutil.Process(job.pid).children()[0].kill()
        killed = time.monotonic()
        assert job.wait(timeout=60) != 0
        seconds = time.monotonic() - killed
    assert seconds < 60
    assert "Run the same command again: it resumes from the last checkpoint" in job.output, job.output[-3000:]
    assert "Signal 9 (SIGKILL) received" in job.output
    text = output_of(argv, tmp_path)
    assert text.endswith("torchrun exited with 0"), text[-3000:]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    numbers = [r["step"] for r in records if r["kind"] == "step"]
    assert numbers == list(range(1, 61)), "steps are missing or twice"
    seen(detect_s=seconds, steps_lost=4)  # at most, with --save-interval 5
    assert steps >= 8 and (run_dir / "report.html").is_file()
    assert (run_dir / "hf_export" / "model.safetensors").is_file()


def test_every_rollout_engine_of_the_flag_can_be_made():
    assert set(get_args(get_type_hints(EngineConfig)["rollout_engine"])) == ENGINES.keys()
