"""What cannot be prepared gives one clear message and leaves nothing behind."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys

import pytest

from tests.prompt_files import prepare, report_of, rl_row, user, write_rows
from tests.test_data_tokenizer import save_tokenizer
from tests.torchrun_jobs import ROOT, environment
from tools.prepare_prompts import main
from tools.prompt_preparation.flags import parse
from tools.prompt_preparation.settings import UsageError
from tools.prompt_preparation.writing import publish, staging


@pytest.fixture
def refused(tmp_path, capsys):
    """Run a command line that is refused; returns its message."""

    def run(*words, code=2):
        before = sorted(path for path in tmp_path.rglob("*"))
        assert main([str(word) for word in words]) == code
        assert sorted(path for path in tmp_path.rglob("*")) == before
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return run


@pytest.fixture
def dapo(tmp_path):
    return write_rows(tmp_path / "dapo.jsonl", [rl_row(f"Question {number}", str(number)) for number in range(3)])


FLAGS = [
    (["--max-rows", "0"], "--max-rows 0 must be at least 1"),
    (
        ["--save", "rows.jsonl.gz"],
        "--save rows.jsonl.gz: expected a directory, or a file that ends in .jsonl or .parquet",
    ),
    (["--max-rows", "many"], "argument --max-rows: invalid int value: 'many'"),
    (["--tokeniser", "x"], "unrecognized arguments: --tokeniser x"),
    (["--domain", "a", "--domain-key", "b"], "--domain and --domain-key: give one of them"),
    (["--take", "math"], "--take math: expected DOMAIN=NUMBER"),
    (["--take", "math=0"], "--take math=0 must be at least 1"),
    (["--take", "math=1", "math=2"], "--take names math twice"),
    (["--where", "a"], "--where a: expected NAME=VALUE"),
    (["--prompt-key", "q"], "--prompt-key is read by --format rows only"),
    (["--ngram", "5"], "--ngram has no effect without --decontaminate"),
    (["--max-response-length", "5"], "--max-response-length has no effect without --responses"),
    (["--responses", "--on-long-response", "keep"], "--on-long-response has no effect without --max-response-length"),
    (["--prompt-suffix", ""], "--prompt-suffix: the value is empty"),
]


@pytest.mark.parametrize(
    ("flags", "message"), FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_flags(tmp_path, dapo, refused, flags, message):
    assert message in refused("--prompt-data", dapo, "--save", tmp_path / "out", *flags)


def test_all_problems_of_the_flags_come_at_once(tmp_path, dapo, refused):
    error = refused("--prompt-data", dapo, "--save", tmp_path / "out", "--ngram", "0", "--max-rows", "-1")
    assert all(text in error for text in ("--max-rows -1", "--ngram 0", "--ngram has no effect"))


@pytest.mark.parametrize("name", ["out", "out.jsonl", "out.parquet"])
def test_nothing_is_overwritten(tmp_path, dapo, refused, name):
    prepare(dapo, tmp_path / name)
    assert f"{tmp_path / name} exists" in refused("--prompt-data", dapo, "--save", tmp_path / name)


def test_a_report_in_the_way_is_not_overwritten(tmp_path, dapo, refused):
    (tmp_path / "out.report.json").touch()
    assert "out.report.json exists" in refused("--prompt-data", dapo, "--save", tmp_path / "out.jsonl")


@pytest.mark.parametrize("name", ["out", "out.jsonl"])
def test_what_came_meanwhile_is_not_overwritten(tmp_path, name):
    settings = parse(["--prompt-data", "x", "--save", str(tmp_path / name)])
    with pytest.raises(UsageError, match="exists"), staging(settings) as directory:
        (directory / "out" / name).touch()
        (directory / "out" / "report.json").touch()
        (tmp_path / name).write_text("theirs")
        publish(directory, settings)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "theirs")]


# ---- sources and columns ----


def test_sources_that_are_not_there(tmp_path, dapo, refused):
    save = ["--save", tmp_path / "out"]
    assert "absent.jsonl: no such file" in refused("--prompt-data", tmp_path / "absent.jsonl", *save)
    assert "unknown suffix '.csv'" in refused("--prompt-data", tmp_path / "x.csv", *save)
    error = refused("--prompt-data", dapo, *save, "--decontaminate", tmp_path / "aime.jsonl")
    assert "--decontaminate" in error and "no such file" in error


def test_columns_of_no_form(tmp_path, refused):
    data = write_rows(tmp_path / "d.parquet", [{"question": "q", "answer": "a"}])
    error = refused("--prompt-data", data, "--save", tmp_path / "out")
    assert f"{data}: the columns question, answer are of no known form" in error
    assert "rl has prompt and reward_model" in error and "nemotron-sft has messages or input and output" in error
    error = refused("--prompt-data", data, "--save", tmp_path / "out", "--format", "openthoughts3")
    assert f"--format openthoughts3: {data} has the columns question, answer; expected conversations" in error
    error = refused("--prompt-data", data, "--save", tmp_path / "out", "--format", "rows")
    assert "expected prompt; see --prompt-key" in error


def test_several_forms(tmp_path, dapo, refused):
    other = write_rows(tmp_path / "o.jsonl", [{"conversations": [{"from": "human", "value": "q"}], "domain": "math"}])
    error = refused("--prompt-data", dapo, other, "--save", tmp_path / "out")
    assert f"several forms: {dapo} is rl, {other} is openthoughts3" in error
    both = write_rows(tmp_path / "b.jsonl", [{"prompt": "q", "reward_model": {}, "messages": [], "category": "c"}])
    assert "could be rl or nemotron-sft" in refused("--prompt-data", both, "--save", tmp_path / "out")


def test_columns_of_flags(tmp_path, dapo, refused):
    words = ["--prompt-data", dapo, "--save", tmp_path / "out"]
    for flag, value in (("--domain-key", "topic"), ("--uid-key", "topic"), ("--where", "topic=x")):
        assert "no key 'topic'" in refused(*words, flag, value, code=1)
    data = write_rows(tmp_path / "b.jsonl", [{"text": "q"}])
    error = refused(*words, "--decontaminate", data)
    assert f"{data}:1 has the columns text; expected one of question" in error and "--question-key" in error
    assert "expected no" in refused(*words, "--decontaminate", data, "--question-key", "no")
    data = write_rows(tmp_path / "c.jsonl", [{"question": "?"}])
    assert f"{data}:1: a question without words" in refused(*words, "--decontaminate", data, code=1)


def test_take_of_a_domain_that_is_not_there(tmp_path, dapo, refused):
    error = refused("--prompt-data", dapo, "--save", tmp_path / "out", "--take", "maths=3")
    assert "no row is of the domain maths; the domains of the rows are math" in error


# ---- rows ----

BAD_ROWS = [
    (b"{broken", "broken JSON"),
    ({"prompt": user("q")}, "no key 'reward_model'"),
    ({**rl_row("q", "1"), "reward_model": {"style": "rule"}}, "no ground_truth"),
    ({**rl_row("q", "1"), "prompt": []}, "prompt is an empty list"),
    (rl_row(" ", "1"), "only whitespace"),
    (rl_row("q\0", "1"), "NUL"),
    (rl_row("q", [1, 2]), "ground_truth is a list"),
    (rl_row("q", '{"inputs": ["1"], "outputs": []}', ability="code"), "1 inputs and 0 outputs"),
]


def test_bad_rows_are_reported_together_or_left_out(tmp_path, dapo, refused):
    good = rl_row("good", "1")
    data = write_rows(tmp_path / "d.jsonl", [good, *(row for row, _ in BAD_ROWS)])
    error = refused("--prompt-data", data, "--save", tmp_path / "out", code=1)
    assert f"{len(BAD_ROWS)} problems in the prompt data" in error and "--on-bad-row skip" in error
    for line, (_, found) in enumerate(BAD_ROWS, start=2):
        assert any(text.startswith(f"  {data}:{line}: ") and found in text for text in error.splitlines()), found
    assert "--prompt-key" not in error  # a flag that this form does not read
    (row,) = prepare(data, tmp_path / "out", "--on-bad-row", "skip")
    assert row["prompt"] == user("good")
    assert report_of(tmp_path / "out")["left_out"]["bad_row"]["rows"] == len(BAD_ROWS)


def test_files_that_cannot_be_read_are_errors_in_any_case(tmp_path, dapo, refused):
    flags = ["--save", tmp_path / "out", "--on-bad-row", "skip", "--format", "rl"]
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    assert "unreadable Parquet" in refused("--prompt-data", dapo, tmp_path / "bad.parquet", *flags, code=1)
    (tmp_path / "empty.jsonl").touch()
    assert "empty.jsonl: no rows" in refused("--prompt-data", dapo, tmp_path / "empty.jsonl", *flags, code=1)


def test_no_row_is_left(tmp_path, dapo, refused):
    flags = ["--prompt-data", dapo, "--save", tmp_path / "out"]
    assert "no row is left; nothing was saved" in refused(*flags, "--domains", "code", code=1)
    data = write_rows(tmp_path / "c.jsonl", [rl_row("q", "1"), rl_row("q", "2")])
    assert "no row is left" in refused("--prompt-data", data, "--save", tmp_path / "out", code=1)


def test_texts_and_messages_do_not_mix(tmp_path, refused):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "text"}, {"prompt": user("message")}])
    error = refused("--prompt-data", data, "--save", tmp_path / "out", code=1)
    assert "a prompt that is messages; expected text, like the first row's; see --prompt-form" in error
    assert [row["prompt"] for row in prepare(data, tmp_path / "a", "--prompt-form", "text")] == ["text", "message"]
    assert len(prepare(data, tmp_path / "b", "--prompt-form", "messages")) == 2
    turns = write_rows(tmp_path / "t.jsonl", [{"prompt": [{"role": "system", "content": "s"}, *user("u")]}])
    error = refused("--prompt-data", turns, "--save", tmp_path / "out", "--prompt-form", "text", code=1)
    assert "messages by system, user" in error and "--prompt-form" in error


# ---- tokenizers ----


def test_tokenizers_that_cannot_be_used(tmp_path, dapo, refused):
    flags = ["--prompt-data", dapo, "--save", tmp_path / "out", "--tokenizer"]
    assert "--tokenizer" in refused(*flags, "no/such-model")
    (tmp_path / "empty").mkdir()
    error = refused(*flags, tmp_path / "empty")
    assert f"--tokenizer {tmp_path}/empty" in error and "holds no vocabulary" in error
    save_tokenizer(tmp_path / "plain")
    assert "has no chat template" in refused(*flags, tmp_path / "plain")


def test_a_response_that_a_run_would_refuse_is_a_bad_row(tmp_path, refused):
    tokenizer = save_tokenizer(tmp_path / "tokenizer", chat=True)
    row = {
        "domain": "math",
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "t</think> a"}],
    }
    data = write_rows(tmp_path / "d.jsonl", [row])
    flags = ["--prompt-data", data, "--save", tmp_path / "out", "--responses", "--tokenizer", tokenizer]
    assert "</think> without <think>" in refused(*flags, code=1)


# ---- the disk ----


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit"), [("out", 50_000), ("out.jsonl", 220_000)])
def test_a_full_disk_leaves_nothing(tmp_path, name, limit):
    """With the smaller limit the spool does not fit; with the larger one it does, and the rows do not."""
    rows = [rl_row(f"Question {random.Random(number).randbytes(300).hex()}", "1") for number in range(400)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "tools/prepare_prompts.py", "--prompt-data", data, "--save", tmp_path / "new" / name],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "cannot be written" in done.stderr and "nothing was saved" in done.stderr
    assert "Traceback" not in done.stderr and list((tmp_path / "new").iterdir()) == []


def test_where_nothing_can_be_written(tmp_path, dapo, refused):
    (tmp_path / "file").touch()
    error = refused("--prompt-data", dapo, "--save", tmp_path / "file" / "out", code=1)
    assert "cannot be written" in error and "nothing was saved" in error


def test_very_many_bad_rows_have_a_short_message(tmp_path, refused):
    many = [json.dumps({**rl_row("q", "1"), "prompt": []}).encode()] * 1200
    error = refused("--prompt-data", write_rows(tmp_path / "d.jsonl", many), "--save", tmp_path / "out", code=1)
    assert "1200 problems" in error and "... and 1180 more" in error and len(error.splitlines()) < 30
