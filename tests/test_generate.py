"""The command that writes responses: what it writes, by an oracle; what it leaves after kills; bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest

from megatron_tropd.cli import ConfigError
from megatron_tropd.data.prompts import PromptFormat, load_prompts
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.generation.flags import parse_flags
from megatron_tropd.generation.job import prepare
from megatron_tropd.generation.journal import DamagedJournal, Journal, Written
from megatron_tropd.generation.run import run
from tests.hf_models import save_hf_checkpoint, save_tokenizer
from tests.sglang_helpers import KEYS, STOP, greedy
from tests.torchrun_jobs import environment
from tests.waiting import wait_for
from tests.warm import WarmJob

BATCH = ("--max-batch-size", "4")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant:"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = save_hf_checkpoint(tmp_path_factory.mktemp("teacher"), "qwen3")
    save_tokenizer(directory)
    return directory


def words_of(number: int) -> str:
    return " ".join(f"w{3 + (7 * number + 3 * i) % 120}" for i in range(2 + number % 4))


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(count: int):
    return [{"prompt": words_of(i), "answer": str(i), "domain": "math" if i % 2 else "code"} for i in range(count)]


def flags_of(model: Path, data: Path, save: Path, *more: str) -> list[str]:
    return [
        "--hf-checkpoint", str(model), "--prompt-data", str(data), "--save", str(save), "--max-response-length", "8",
        "--responses-per-shard", "5", *more, *(() if "--engine" in more else ("--engine", "embedded", *BATCH)),
    ]  # fmt: skip


def generate(model: Path, data: Path, save: Path, *more: str) -> list[dict]:
    run(prepare(parse_flags(flags_of(model, data, save, *more))))
    return read(save / "data")


def read(directory: Path) -> list[dict]:
    return [row for file in sorted(directory.glob("*.parquet")) for row in pyarrow.parquet.read_table(file).to_pylist()]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {f"{file.parent.name}/{file.name}": file.read_bytes() for file in sorted(directory.glob("*/*.parquet"))}


def test_greedy_responses_are_those_of_transformers(model, tmp_path):
    from transformers import AutoModelForCausalLM

    data = write_rows(tmp_path / "rows.jsonl", rows_of(12))
    rows = generate(model, data, tmp_path / "out", "--temperature", "0", "--keep", "all")
    oracle, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), load_tokenizer(model)
    assert len(rows) == 12
    for i, row in enumerate(rows):
        expected = greedy(oracle, tokenizer(words_of(i)).input_ids, 8)
        assert row["response_ids"] == expected and row["num_tokens"] == len(expected)
        assert row["response"] == tokenizer.decode([t for t in expected if t != STOP])
        assert row["finish"] == ("stop" if expected[-1] == STOP else "length")
        assert (row["uid"], row["prompt_uid"], row["sample"], row["model"]) == (f"{i}/0", str(i), 0, str(model))
        assert (row["prompt"], row["answer"], row["domain"]) == (words_of(i), str(i), "math" if i % 2 else "code")


def test_kept_and_dropped_responses_are_all_responses(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(30))
    options = ("--n-samples-per-prompt", "3", "--max-response-length", "40")
    with_text = generate(model, data, tmp_path / "all", "--keep", "all", *options)
    empty = read(tmp_path / "all" / "dropped")
    assert empty and all(row["response"] == "" and row["fault"] == "response is empty" for row in empty)
    assert all(row["response"] and row["fault"] is None for row in with_text)
    everything = sorted([*with_text, *empty], key=lambda row: (int(row["prompt_uid"]), row["sample"]))
    finished = generate(model, data, tmp_path / "finished", *options)
    assert {row["finish"] for row in with_text} == {"stop", "length"}  # otherwise this test says little
    assert finished == [row for row in with_text if row["finish"] == "stop"]
    assert read(tmp_path / "finished" / "dropped") == [row for row in everything if row not in finished]
    assert [(row["prompt_uid"], row["sample"]) for row in everything] == [
        (str(i), s) for i in range(30) for s in range(3)
    ]
    assert len({tuple(row["response_ids"]) for row in everything}) > 60  # samples of a prompt differ
    report = json.loads((tmp_path / "finished" / "report.json").read_text())
    assert report == {
        "prompts": 30, "bad_rows": 0, "responses": 90, "tokens": sum(row["num_tokens"] for row in everything),
        "finished": sum(row["finish"] == "stop" for row in everything), "graded": 0, "right": 0,
        "unreadable": len(empty), "kept": len(finished),
    }  # fmt: skip


def test_only_right_answers_are_kept(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(10))
    wholes = generate(model, data, tmp_path / "all", "--max-response-length", "60")
    assert len(wholes) > 2
    known = {row["prompt_uid"]: row["response"] for row in wholes}
    first = next(iter(known))
    answers = {**known, first: "another"}
    rows = [{**row, "answer": answers.get(str(i), "none")} for i, row in enumerate(rows_of(10))]
    graded = write_rows(tmp_path / "graded.jsonl", rows)
    options = ("--keep", "right", "--answer-pattern", "(?s)(.*)", "--max-response-length", "60")
    rows = generate(model, graded, tmp_path / "right", *options)
    assert [row["prompt_uid"] for row in rows] == [uid for uid in known if uid != first]
    assert all(row["right"] for row in rows)


def test_a_run_reads_what_was_written(model, tmp_path):
    messages = [{"role": "user", "content": words_of(1)}, {"role": "assistant", "content": "w5"}]
    rows = [{"prompt": messages, "uid": "first"}, {"prompt": words_of(2), "uid": "second"}]
    (model_with_chat := tmp_path / "chat").mkdir()
    for file in model.iterdir():
        (model_with_chat / file.name).symlink_to(file)
    (model_with_chat / "chat_template.jinja").write_text(CHAT)
    data = write_rows(tmp_path / "rows.jsonl", rows)
    options = ("--apply-chat-template", "--keep", "all", "--n-samples-per-prompt", "2")
    written = generate(model_with_chat, data, tmp_path / "out", *options)
    fmt = PromptFormat(chat_template=True, max_prompt_length=50, max_response_length=50)
    tokenizer = load_tokenizer(model_with_chat)
    read_back = load_prompts(tmp_path / "out" / "data", tokenizer, fmt, cache_root=tmp_path / "cache")
    source = load_prompts(
        data, tokenizer, PromptFormat(chat_template=True, max_prompt_length=50, max_response_length=50, response_key=""),
        cache_root=tmp_path / "cache",
    )  # fmt: skip
    assert [p.token_ids for p in read_back] == [source[i].token_ids for i in (0, 0, 1, 1)]
    assert [p.name for p in read_back] == ["first/0", "first/1", "second/0", "second/1"]
    for prompt, row in zip(read_back, written, strict=True):
        assert list(prompt.teacher_response_ids or ())[:-1] == [t for t in row["response_ids"] if t > STOP]


def _written_so_far(save: Path) -> int:
    return sum(file.stat().st_size for file in [*save.glob("journal/*.jsonl"), *save.glob("shards/*.json")])


@pytest.mark.slow
def test_killed_five_times_it_ends_with_the_rows_of_an_unbroken_run(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(90))
    options = ("--keep", "all", "--n-samples-per-prompt", "2", "--max-response-length", "60")
    generate(model, data, tmp_path / "unbroken", *options)
    save = tmp_path / "killed"
    save.mkdir()
    command = flags_of(model, data, save, *options)
    broken = 0
    for _ in range(5):
        before = _written_so_far(save)
        with WarmJob(command, cwd=tmp_path, env=environment(), program="megatron_tropd.generate") as job:
            wait_for(lambda before=before: _written_so_far(save) > before, job)
            job.kill()
            job.wait(30)
            broken += job.poll() == -9
    assert broken == 5 and not (save / "report.json").exists()
    run(prepare(parse_flags(command)))
    assert bytes_of(save) == bytes_of(tmp_path / "unbroken")
    assert (save / "report.json").read_bytes() == (tmp_path / "unbroken" / "report.json").read_bytes()


@pytest.mark.slow
def test_a_full_disk_ends_it_and_nothing_is_lost(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(20))
    options = ("--keep", "all", "--max-response-length", "60")
    generate(model, data, tmp_path / "unbroken", *options)
    save = tmp_path / "full"
    command = flags_of(model, data, save, *options)
    with WarmJob(command, cwd=tmp_path, env=environment(), program="tests.small_disk") as job:
        assert job.wait(120) == 1
        assert (
            "parquet cannot be written (File too large)" in job.output and "give the same command again" in job.output
        )
        assert "Traceback" not in job.output
    assert _written_so_far(save) > 0
    run(prepare(parse_flags(command)))
    assert bytes_of(save) == bytes_of(tmp_path / "unbroken")


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--temperature", "0.5"], "--temperature: 1.0 there, 0.5 here"),
        (["--seed", "5"], "--seed: 1234 there, 5 here"),
        (["--keep", "all"], "--keep: 'finished' there, 'all' here"),
        (["--max-prompt-length", "77"], "--prompt-data, or how they are read"),
        (["--dtype", "bfloat16"], "--dtype: 'float32' there, 'bfloat16' here"),
    ],
)
def test_other_settings_are_refused(model, tmp_path, more, found):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(3))
    generate(model, data, tmp_path / "out", "--max-response-length", "60")
    kept = bytes_of(tmp_path / "out")
    with pytest.raises(ConfigError, match="made in another way") as error:
        generate(model, data, tmp_path / "out", "--max-response-length", "60", *more)
    assert found in str(error.value) and bytes_of(tmp_path / "out") == kept


def test_another_model_of_the_same_shape_is_refused_and_moved_files_are_not(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(3))
    options = ("--max-response-length", "60")
    rows = generate(model, data, tmp_path / "out", *options)
    moved = tmp_path / "moved"
    shutil.copytree(model, moved / "model")
    (moved / "rows.jsonl").write_bytes(data.read_bytes())
    assert generate(moved / "model", moved / "rows.jsonl", tmp_path / "out", *options) == rows
    other = save_hf_checkpoint(tmp_path / "other", "qwen3", seed=1)
    with pytest.raises(ConfigError, match="the model of --hf-checkpoint differ"):
        generate(other, data, tmp_path / "out", *options)


def _no_tokenizer(model: Path, tmp_path: Path) -> Path:
    (directory := tmp_path / "bare").mkdir()
    for file in model.iterdir():
        if not file.name.startswith("tokenizer"):
            (directory / file.name).symlink_to(file)
    return directory


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([{"question": "a"}], [], "no key 'prompt' (keys: 'question')"),
        ([{"prompt": "w5", "uid": 1}, {"prompt": "w6", "uid": 1}], [], "uid 1 for the second time"),
        ([{"prompt": "w5", "uid": 1}, {"prompt": "w6"}], [], "uid 1 for the second time"),
        ([{"prompt": "w5", "uid": 1}, {"prompt": "w6", "uid": "1"}], [], "uid 1 for the second time"),
        ([], [], "no usable row"),
        (rows_of(1), ["--num-servers", "2"], "--engine embedded starts no servers: leave out --num-servers"),
        (rows_of(1), ["--sglang-start-timout", "9"], "did you mean --sglang-start-timeout?"),
        (rows_of(1), ["--engine", "sglang", "--device", "cpu", *BATCH], "leave out --device, --max-batch-size"),
        (
            rows_of(1),
            ["--engine", "sglang", "--server-urls", "http://127.0.0.1:9", "--sglang-quantization", "fp8"],
            "servers that run already: leave out --sglang-quantization",
        ),
        (rows_of(1), ["--apply-chat-template"], "has no chat template"),
        (rows_of(1), ["--max-response-length", "100000"], "--max-response-length 100000"),
        (rows_of(1), ["--stop-token-ids", "999"], "--stop-token-ids 999: the model has ids from 0 to 130"),
        (rows_of(1), ["--temperature", "-1"], "--temperature -1"),
        (rows_of(1), ["--temperature", "0", "--n-samples-per-prompt", "2"], "would be the same"),
        (rows_of(1), ["--n-samples-per-prompt", "0", "--responses-per-shard", "0"], "--responses-per-shard 0"),
        ([{"prompt": "w5"}], ["--keep", "right"], "no row of --prompt-data has an answer"),
        (rows_of(1), ["--keep", "right", "--answer-pattern", "("], "--answer-pattern"),
        ([{**rows_of(1)[0], "grader": "choice"}], ["--keep", "right"], "--prompt-data: a reference answer"),
        (rows_of(1), ["--device", "tpu9"], "--device tpu9"),
        (rows_of(1), ["--engine", "sglang", "--sglang-python", "/none"], "/none does not exist"),
        (rows_of(1), ["--engine", "sglang", "--server-urls", "localhost"], "--server-urls localhost"),
        (rows_of(1), ["--engine", "sglang", "--sglang-python", "/bin/sh", "--sglang-port", "1"], "--sglang-port"),
    ],
)
def test_bad_input_is_one_message(model, tmp_path, rows, more, message):
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ConfigError) as error:
        generate(model, data, tmp_path / "out", *more)
    assert message in str(error.value)


def test_bad_directories_are_one_message(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(2))
    with pytest.raises(ConfigError, match="holds no vocabulary"):
        generate(_no_tokenizer(model, tmp_path), data, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--hf-checkpoint \S+nowhere is not a directory"):
        generate(tmp_path / "nowhere", data, tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        generate(model, data, tmp_path)
    with pytest.raises(ValueError, match="no response was kept: all 2 are in"):
        generate(model, data, tmp_path / "short", "--max-response-length", "1")


def test_bad_rows_may_be_left_out(model, tmp_path):
    rows = rows_of(6)
    rows[2] = {"prompt": ""}
    data = write_rows(tmp_path / "rows.jsonl", rows)
    written = generate(model, data, tmp_path / "out", "--on-bad-row", "skip", "--keep", "all")
    assert [row["prompt_uid"] for row in written] == ["0", "1", "3", "4", "5"]
    good = write_rows(tmp_path / "good.jsonl", [{**row, "uid": i} for i, row in enumerate(rows_of(6)) if i != 2])
    again = generate(model, good, tmp_path / "again", "--keep", "all")
    assert [row["response_ids"] for row in again] == [row["response_ids"] for row in written]


@pytest.mark.thorough
def test_servers_that_run_already_write(sglang, tmp_path, monkeypatch):
    sglang.push()
    directory = tmp_path / "teacher"
    sglang.student.model.save_pretrained(directory)
    save_tokenizer(directory)
    data = write_rows(tmp_path / "rows.jsonl", rows_of(9))
    monkeypatch.setenv("TROPD_SGLANG_API_KEY", KEYS.api)
    monkeypatch.setenv("TROPD_SGLANG_ADMIN_API_KEY", KEYS.admin)
    urls = [engine.url for engine in sglang.engines]
    options = ("--engine", "sglang", "--server-urls", *urls, "--keep", "all", "--max-concurrent-prompts", "2")
    rows = generate(directory, data, tmp_path / "out", "--temperature", "0", *options)
    rows += read(tmp_path / "out" / "dropped")
    tokenizer = load_tokenizer(directory)
    assert len(rows) == 9
    for row in rows:
        i = int(row["prompt_uid"])
        assert row["response_ids"] == greedy(sglang.student.model, tokenizer(words_of(i)).input_ids, 8)
    several = generate(directory, data, tmp_path / "several", "--n-samples-per-prompt", "3", *options)
    several += read(tmp_path / "several" / "dropped")  # an empty one is put aside
    names = sorted((int(row["prompt_uid"]), row["sample"]) for row in several)
    assert names == [(i, s) for i in range(9) for s in range(3)]
    assert len({tuple(row["response_ids"]) for row in several}) > 9


def test_a_dead_server_is_one_message(model, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", rows_of(2))
    dead = ("--engine", "sglang", "--server-urls", "http://127.0.0.1:9", "--sglang-start-timeout", "1")
    command = flags_of(model, data, tmp_path / "out", *dead)
    with WarmJob(command, cwd=tmp_path, env=environment(), program="megatron_tropd.generate") as job:
        assert job.wait(120) == 1
    assert "http://127.0.0.1:9) did not answer within 1 s (--sglang-start-timeout)" in job.output
    assert "Traceback" not in job.output and os.listdir(tmp_path / "out" / "data") == []


def test_a_journal_that_was_cut_anywhere_has_its_whole_lines(tmp_path):
    responses = [Written(number=i, sample=0, token_ids=(i, 10 * i, 2), finish="stop") for i in range(3)]
    whole = Journal(tmp_path / "whole")
    for response in responses:
        whole.append([response])
    data = (tmp_path / "whole").read_bytes()
    for length in range(len(data) + 1):
        (path := tmp_path / "cut").write_bytes(data[:length])
        journal = Journal(path)
        kept = list(journal.read())
        assert kept == responses[: data[:length].count(b"\n")]
        journal.append(responses[len(kept) :])
        assert list(Journal(path).read()) == responses and path.read_bytes() == data


def test_a_changed_journal_is_named(tmp_path):
    (path := tmp_path / "00000.jsonl").write_text('{"number": 1}\n')
    with pytest.raises(DamagedJournal, match=r"00000.jsonl:1 is not a response"):
        list(Journal(path).read())
