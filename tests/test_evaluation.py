"""Evaluation: pools of engines, and the command with a real checkpoint.  What is right: test_grading.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from functools import partial

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.errors import EngineError
from megatron_tropd.evaluate import main
from megatron_tropd.evaluation import DECODINGS, GREEDY, TEMPERATURE_1, accuracy_of, check_prompts, evaluate
from megatron_tropd.grading.grader import make_grader
from megatron_tropd.reports import Accuracy
from megatron_tropd.rng import Stream
from megatron_tropd.rollout.embedded.engine import EmbeddedEngine
from megatron_tropd.rollout.embedded.pool import EmbeddedPool
from megatron_tropd.types import Prompt, Rollout
from megatron_tropd.weights.files.hf_checkpoint import HfCheckpoint
from tests.rollout_helpers import params, requests_of, tiny_engine, tiny_model, word_tokenizer

STOPS = tuple(range(0, 12))
ALL = make_grader("exact", r"(?s)(.*)")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(engine, tokenizer, prompts): the answer of every even uid is what greedy decoding writes."""
    directory = tmp_path_factory.mktemp("student")
    tokenizer = word_tokenizer(directory)
    engine, _ = tiny_engine(directory, stop=STOPS)
    requests = [
        dataclasses.replace(request, prompt_uid=i, sample_index=0)
        for i, request in enumerate(requests_of([3 + i % 4 for i in range(21)], max_new=10))
    ]
    prompts = []
    for rollout in engine.generate(requests, params(temperature=0.0)):
        written = tokenizer.decode(list(rollout.token_ids[rollout.prompt_len :]), skip_special_tokens=True)
        prompts.append(
            Prompt(
                uid=rollout.prompt_uid,
                token_ids=rollout.token_ids[: rollout.prompt_len],
                answer=written if rollout.prompt_uid % 2 == 0 else "something else",
            )
        )
    return engine, tokenizer, prompts


def run(made, decodings, **changes):
    engine, tokenizer, prompts = made
    options = {"grader": ALL, "max_response_length": 10, "seed": 1, "step": 7, **changes}
    return evaluate(engine.generate, prompts, tokenizer, decodings, **options)


def test_greedy_accuracy_counts_finished_right_answers(made):
    engine, _, prompts = made
    greedy = engine.generate(
        [dataclasses.replace(r, prompt_uid=p.uid, sample_index=0, token_ids=p.token_ids, prompt_len=len(p.token_ids))
         for r, p in zip(requests_of([3] * len(prompts), max_new=10), prompts, strict=True)],
        params(temperature=0.0),
    )  # fmt: skip
    ended = [rollout.finish == "stop" for rollout in greedy]
    assert 0 < sum(ended) < len(ended)  # otherwise this test says little
    (report,) = run(made, [GREEDY])
    assert report.accuracy == sum(e for e, p in zip(ended, prompts, strict=True) if p.uid % 2 == 0) / len(prompts)
    assert report.finished == sum(ended) / len(ended)
    assert report.mean_response_len == sum(rollout.response_len for rollout in greedy) / len(greedy)
    assert (report.step, report.decoding, report.num_prompts) == (7, "greedy", 21)


def test_the_grader_decides_what_is_right(made):
    engine, tokenizer, prompts = made
    wrapped = [dataclasses.replace(prompt, answer=f"\\text{{{prompt.answer}}}") for prompt in prompts]
    (plain,) = run(made, [GREEDY])
    (exact,) = run((engine, tokenizer, wrapped), [GREEDY])
    (math,) = run((engine, tokenizer, wrapped), [GREEDY], grader=make_grader("math", r"(?s)(.*)"))
    assert exact.accuracy == 0 < plain.accuracy == math.accuracy


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=30))
def test_the_standard_error_is_that_of_a_mean_over_prompts(shares):
    found = accuracy_of(shares)
    assert found.accuracy == pytest.approx(np.mean(shares)) and found.num_prompts == len(shares)
    assert found.std_error == pytest.approx(np.std(shares, ddof=1) / np.sqrt(len(shares)))


def test_a_single_prompt_tells_no_error():
    assert accuracy_of([0.5]) == Accuracy(accuracy=0.5, std_error=0.0, num_prompts=1)


WRITTEN = {1: "w7 w7 w7 w7", 2: "w7 w8 w8 w7", 3: "w8 w8 w8 w8", 4: "A w8 w8 w8"}
"""By prompt: the words of its four samples."""


def test_samples_are_averaged_and_domains_and_graders_are_those_of_the_rows(made):
    """The engine is a script with known answers."""
    _, tokenizer, _ = made
    domains, words = {1: "math", 2: "math", 3: "code"}, {"w7": 7, "w8": 8}
    prompts = [
        Prompt(
            uid=uid,
            token_ids=(20,),
            answer="C" if uid == 4 else "w7",
            domain=domains.get(uid, ""),
            grader="choice" if uid == 4 else "",
        )
        for uid in WRITTEN
    ]
    assert str(tokenizer.decode([7])).strip() == "w7"
    asked = []

    def generate(requests, params):
        asked.append(len(requests))
        return [
            Rollout(prompt_uid=r.prompt_uid, sample_index=r.sample_index, token_ids=(20, words.get(word, 9)), prompt_len=1,
                    guidance_len=0, logprobs=(0.0,), weight_version=(0, 0), finish="stop")
            for r in requests
            for word in [WRITTEN[r.prompt_uid].split()[r.sample_index]]
        ]  # fmt: skip

    greedy, drawn = evaluate(
        generate,
        prompts,
        tokenizer,
        [GREEDY, TEMPERATURE_1],
        grader=ALL,
        max_response_length=4,
        seed=0,
        step=0,
        num_samples=4,
    )
    assert asked == [4, 16] and (greedy.num_samples, drawn.num_samples) == (1, 4)
    assert (greedy.accuracy, drawn.accuracy) == (0.5, 0.375)
    assert drawn.std_error == pytest.approx(np.std([1, 0.5, 0, 0], ddof=1) / 2)
    assert drawn.domains["math"] == Accuracy(accuracy=0.75, std_error=pytest.approx(0.25), num_prompts=2)
    assert drawn.domains["code"] == Accuracy(accuracy=0.0, std_error=0.0, num_prompts=1) and set(drawn.domains) == {
        "code",
        "math",
    }


def _by_one_engine_and_by_a_pool(directory, prompts):
    """On every rank: reports of this rank's engine alone, and of the engines of all ranks together."""
    checkpoint = HfCheckpoint.open(directory)
    engine, tokenizer = EmbeddedEngine(directory, stop_token_ids=STOPS), load_tokenizer(directory)
    pool = EmbeddedPool(engine)
    report = pool.push(lambda: [(name, checkpoint.read(name)) for name in checkpoint.tensors], 3)
    assert not report.probe_logprobs and pool.weight_version == 3
    options = {"grader": ALL, "max_response_length": 10, "seed": 1, "step": 7, "num_samples": 2}
    decodings = list(DECODINGS.values())
    return (
        evaluate(engine.generate, prompts, tokenizer, decodings, **options),
        evaluate(partial(pool.generate, version=3), prompts, tokenizer, decodings, **options),
    )


def test_a_pool_of_engines_gives_the_reports_of_one(made, ranks, tmp_path):
    word_tokenizer(tmp_path)
    tiny_model(tmp_path)
    _, _, prompts = made
    answers = ranks(2).run(_by_one_engine_and_by_a_pool, tmp_path, prompts)
    for one, pool in answers:
        assert one == pool == answers[0][0] and all(0 < report.finished < 1 for report in one)


def _pool_with_one_broken_engine(directory):
    checkpoint = HfCheckpoint.open(directory)
    pool = EmbeddedPool(EmbeddedEngine(directory, stop_token_ids=STOPS))
    pool.push(lambda: [(name, checkpoint.read(name)) for name in checkpoint.tensors], 1)
    if dist.get_rank() == 1:
        pool.close()
    try:
        pool.generate(requests_of([3, 4]), params(), 1)
    except EngineError as error:
        return str(error)


def test_an_engine_that_fails_is_the_same_error_on_every_rank(ranks, tmp_path):
    tiny_model(tmp_path)
    first, second = ranks(2).run(_pool_with_one_broken_engine, tmp_path)
    assert first == second == "engine of rank 1: the embedded engine is closed"


def test_sampled_evaluation_is_reproducible_and_apart_from_training(made):
    assert run(made, [TEMPERATURE_1]) == run(made, [TEMPERATURE_1])
    lengths = {seed: run(made, [TEMPERATURE_1], seed=seed)[0].mean_response_len for seed in range(3)}
    assert len(set(lengths.values())) > 1
    assert params().stream is not Stream.EVALUATION


def test_missing_answers_and_groups_are_refused(made):
    _, _, prompts = made
    unanswered = [*prompts, Prompt(uid=99, token_ids=(3,))]
    with pytest.raises(ValueError, match="uid 99"):
        check_prompts(unanswered, ALL)
    with pytest.raises(ValueError, match="no prompts"):
        check_prompts([], ALL)
    for answer, fault in ((7, "uid 99.*is a int|is a int.*uid 99"), ("  ", "blank"), ("nan", "'nan'")):
        with pytest.raises(ValueError, match=fault):
            check_prompts([*prompts, Prompt(uid=99, token_ids=(3,), answer=answer)], ALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    tiny_model(directory)
    word_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": list(STOPS)}))
    data = directory / "eval.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} w5", "answer": "w7", "response": ""} for i in range(20, 32)]
    data.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return directory, data


def test_the_command_reports_every_decoding(checkpoint, tmp_path, capsys):
    directory, data = checkpoint
    output = tmp_path / "report.json"
    code = main(
        ["--hf-checkpoint", str(directory), "--eval-data", str(data), "--max-response-length", "8",
         "--num-prompts", "10", "--output", str(output), "--device", "cpu"]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    reports = json.loads(output.read_text())
    assert [report["decoding"] for report in reports] == list(DECODINGS)
    assert all(report["num_prompts"] == 10 and 0 <= report["finished"] <= 1 for report in reports)
    assert all(1 <= report["mean_response_len"] <= 8 for report in reports)
    assert "top_p_0.7" in printed and json.dumps(reports, indent=2) in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hf-checkpoint", "nowhere"], "nowhere"),
        (["--eval-data", "none.jsonl"], "none.jsonl: no such file"),
        (["--answer-pattern", "("], "--answer-pattern '(' is not a regular expression"),
        (["--answer-pattern", "x"], "has no group"),
        (["--answer-key", "solution"], "--answer-key"),
        (["--prompt-key", "question"], "--prompt-key"),
        (["--max-response-length", "1000"], "--max-response-length"),
        (["--max-response-length", "0", "--num-prompts", "0"], "--num-prompts 0: expected at least 1"),
        (["--output", "missing/dir/x.json"], "is not a directory"),
        (["--output", "/dev/full", "--max-response-length", "4", "--decodings", "greedy"], "No space left on device"),
        (["--device", "gpu"], "--device gpu cannot be used"),
        (["--device", "meta:x"], "--device meta:x cannot be used"),
    ],
)
def test_user_errors_exit_2_with_one_message(checkpoint, flags, message, capsys):
    directory, data = checkpoint
    assert main(["--hf-checkpoint", str(directory), "--eval-data", str(data), "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and "--prompt-data" not in error


def test_rows_of_several_graders_are_one_evaluation(checkpoint, tmp_path, capsys):
    directory, _ = checkpoint
    constraints = [{"instruction_id": "punctuation:no_comma", "kwargs": {}}]
    tests = [{"input": "", "output": "1", "testtype": "stdin"}]
    graded = {"math": "7", "choice": "C", "instructions": json.dumps(constraints), "code": json.dumps(tests)}
    data, output = tmp_path / "eval.jsonl", tmp_path / "report.json"
    rows = [{"prompt": "w20 w21", "answer": answer, "grader": kind, "domain": kind} for kind, answer in graded.items()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["--hf-checkpoint", str(directory), "--eval-data", str(data), "--device", "cpu", "--decodings", "temperature_1",
            "--max-response-length", "40", "--num-samples", "3", "--seed", "3", "--output", str(output)]  # fmt: skip
    assert main(argv) == 0
    (report,) = json.loads(output.read_text())
    shares = {name: measured["accuracy"] for name, measured in report["domains"].items()}
    assert shares.pop("instructions") > 0, "words without commas"
    assert shares == {"math": 0.0, "choice": 0.0, "code": 0.0}
    assert report["num_samples"] == 3 and "instructions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "K", "grader": "choice"}, "'K', expected a capital letter from A to J for --grader choice"),
        ({"answer": "7", "grader": "rule"}, "the grader 'rule', expected one of exact, math"),
        ({"answer": "[]", "grader": "code"}, "tests are not a list with an entry"),
        ({"answer": '[{"instruction_id": "a:b"}]', "grader": "instructions"}, "'a:b'; expected one of IFEval's 25"),
        ({"answer": "7", "grader": ["math"]}, "--grader-key"),
    ],
)
def test_bad_references_are_found_before_the_model_is_read(checkpoint, tmp_path, row, message, monkeypatch, capsys):
    directory, _ = checkpoint
    data = tmp_path / "eval.jsonl"
    data.write_text(json.dumps({"prompt": "w20", **row}) + "\n")
    monkeypatch.setattr("megatron_tropd.evaluate.load_engine", lambda *_, **__: pytest.fail("the model was read"))
    assert main(["--hf-checkpoint", str(directory), "--eval-data", str(data), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_a_missing_package_is_a_user_error(checkpoint, monkeypatch, capsys):
    directory, data = checkpoint
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "math_verify" else find(name, *rest)
    )
    assert (
        main(["--hf-checkpoint", str(directory), "--eval-data", str(data), "--device", "cpu", "--grader", "math"]) == 2
    )
    assert "pip install math-verify" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_a_user_error(checkpoint, tmp_path, capsys):
    directory, data = checkpoint
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["--hf-checkpoint", str(tmp_path), "--eval-data", str(data)]) == 2
    assert "model.safetensors" in capsys.readouterr().err
