"""The forms in which data is stored: every one gives the same prompts as plain JSONL, and none is half read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tropd.data.prompts import PromptError, load_prompts
from megatron_tropd.data.reading import sources, spans
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.hub_helpers import COMMIT, fill_cache
from tests.test_data_prompts import CHAT, FORMAT, SKIP, problems
from tests.test_data_tokenizer import save_tokenizer

ROWS = [{"prompt": f"row {number}", "response": "r" * (number % 3 + 1), "answer": number} for number in range(7)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


@pytest.fixture
def plain(tokenizer, tmp_path):
    path = tmp_path / "plain" / "rows.jsonl"
    path.parent.mkdir()
    path.write_bytes(LINES)
    return list(load_prompts(path, tokenizer, FORMAT))


def _zst(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


FILES = {
    "a.ndjson": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.zst": _zst(LINES),
    "a.jsonl.bz2": bz2.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "array.json": json.dumps(ROWS, indent=2).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "lines.json": LINES,
    "blank.jsonl": LINES + b"\n \n",
}


@pytest.mark.parametrize("name", FILES)
def test_files(tokenizer, tmp_path, plain, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert list(load_prompts(tmp_path / name, tokenizer, FORMAT)) == plain


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.jsonl.bz2", "a.jsonl.xz", "array.json"])
def test_a_truncated_file_is_an_error_even_when_rows_are_skipped(tokenizer, tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name][:-7])
    error = problems(tokenizer, tmp_path / name, SKIP)
    assert error.rows[0].line == 0 and name in str(error) and "--on-bad-row" not in str(error)


def test_one_row_and_no_row_in_a_json_file(tokenizer, tmp_path):
    one = tmp_path / "one.json"
    one.write_text('{"prompt": "a"}')
    assert len(load_prompts(one, tokenizer, FORMAT)) == 1
    for text, found in (
        ("[]", "no prompts"),
        ("", "no prompts"),
        ('{\n"data": [1]}', "a JSON dict"),
        ("7", "a JSON int"),
    ):
        one.write_text(text)
        assert found in str(problems(tokenizer, one))
    one.write_text('[{"prompt": "a"}, 7]')
    assert [row.line for row in problems(tokenizer, one).rows] == [2]


def test_a_directory_of_shards(tokenizer, tmp_path, plain):
    shards = tmp_path / "shards" / "deeper"
    shards.mkdir(parents=True)
    lines = LINES.splitlines(keepends=True)
    (shards / "part-1.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[3:])))
    (shards / "part-0.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[:3])))
    (shards.parent / "README.md").write_text("# data")
    (shards.parent / ".hidden.jsonl").write_text("no JSON")
    assert list(load_prompts(shards.parent, tokenizer, FORMAT)) == plain


def test_splits_must_be_named_and_files_must_have_one(tokenizer, tmp_path, plain):
    folder = tmp_path / "splits"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), folder / "test-00000-of-00001.parquet")
    error = problems(tokenizer, folder)
    assert "several splits: train, test" in str(error) and f"{folder}::train" in str(error)
    assert list(load_prompts(f"{folder}::train", tokenizer, FORMAT)) == plain
    assert list(load_prompts(f"{folder}::test", tokenizer, FORMAT)) == plain[:2]
    assert "no split 'dev' among train, test" in str(problems(tokenizer, f"{folder}::dev"))
    (folder / "extra.parquet").write_bytes((folder / "test-00000-of-00001.parquet").read_bytes())
    assert "extra.parquet" in str(problems(tokenizer, f"{folder}::train"))


def test_configurations_of_a_data_card(tokenizer, tmp_path, plain):
    folder = tmp_path / "card"
    folder.mkdir()
    for name, rows in (("maths", ROWS), ("code", ROWS[:1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = "---\nconfigs:\n- config_name: maths\n  data_files: maths.jsonl\n- config_name: code\n  data_files: code.jsonl\n---\n"
    (folder / "README.md").write_text(card)
    assert list(load_prompts(f"{folder}::maths/train", tokenizer, FORMAT)) == plain
    assert "maths" in str(problems(tokenizer, folder))


def test_saved_data_sets(tokenizer, tmp_path, plain):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(tmp_path / "two")
    assert list(load_prompts(tmp_path / "one", tokenizer, FORMAT)) == plain
    assert list(load_prompts(f"{tmp_path / 'two'}::train", tokenizer, FORMAT)) == plain
    assert "several splits: train, test" in str(problems(tokenizer, tmp_path / "two"))
    assert "without splits" in str(problems(tokenizer, f"{tmp_path / 'one'}::train"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"broken")
    assert "unreadable data set" in str(problems(tokenizer, tmp_path / "one"))


def test_what_is_no_data(tokenizer, tmp_path):
    (tmp_path / "rows.csv").write_text("prompt\na\n")
    (tmp_path / "empty").mkdir()
    for given, found in (
        ("rows.csv", "unknown suffix '.csv'"),
        ("missing.jsonl", "no such file"),
        ("empty", "a directory without readable data"),
        ("table.parquet.gz", "unknown suffix '.gz'"),
        ("rows.csv::train", "a split of something that is not a directory"),
        ("no spaces allowed", "no such file or data set"),
    ):
        (row,) = problems(tokenizer, tmp_path / given, SKIP).rows
        assert row.line == 0 and row.flag == "--prompt-data" and found in row.found
    with pytest.raises(PromptError, match=r"HF_HUB_OFFLINE is 1.*see --eval-data"):
        load_prompts("owner/no-such-data", tokenizer, FORMAT, flag="--eval-data")


def test_errors_about_files_name_what_was_given(tokenizer, tmp_path):
    """By the flag of this call, although the cache was made for another; also for damaged descriptions and odd names."""
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1")
    for flag in ("--prompt-data", "--eval-data"):
        with pytest.raises(PromptError, match=f"unreadable Parquet.*see {flag}$"):
            load_prompts(broken, tokenizer, FORMAT, flag=flag)
    for text in ("{", "[]", "{}", '{"splits": 3}'):
        (tmp_path / "dataset_dict.json").write_text(text)
        assert "dataset_dict.json: unreadable" in str(problems(tokenizer, tmp_path))
    assert "File name too long" in str(problems(tokenizer, "x" * 5000 + ".jsonl"))
    assert "no such file" in str(problems(tokenizer, "a\0b.jsonl"))


@pytest.mark.parametrize(("span_bytes", "rows"), [(1, 2), (7, 2), (50, 7), (100, 7), (101, 7), (1000, 7)])
def test_spans_of_a_file_give_every_row_once_with_its_line(tokenizer, tmp_path, monkeypatch, plain, span_bytes, rows):
    lines = b"".join(LINES.splitlines(keepends=True)[:rows])
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(lines + b"{\n" + lines.replace(b"row", b"other"))
    monkeypatch.setattr(spans, "SPAN_BYTES", span_bytes)
    assert len(spans.spans_of(sources.DataFile(path=str(path), kind="jsonl"))) == -(-len(lines) // span_bytes)
    assert list(load_prompts(path, tokenizer, FORMAT, cache_root=tmp_path / "a")) == plain[:rows]
    kept = load_prompts([path, broken], tokenizer, SKIP, cache_root=tmp_path / "b")
    assert [(row.path, row.line) for row in kept.skipped] == [(str(broken), rows + 1)]
    assert [prompt.uid for prompt in kept] == [*range(2 * rows), *range(2 * rows + 1, 3 * rows + 1)]


def test_spans_of_parquet_and_saved_data(tokenizer, tmp_path, monkeypatch, plain):
    monkeypatch.setattr(spans, "SPAN_ROWS", 3)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "p.parquet", row_group_size=2)
    file = sources.DataFile(path=str(tmp_path / "p.parquet"), kind="parquet")
    assert [(span.start, span.stop) for span in spans.spans_of(file)] == [(0, 2), (2, None)]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("p.parquet", "saved"):
        assert list(load_prompts(tmp_path / name, tokenizer, FORMAT)) == plain


def test_nested_keys_and_text_uids(tokenizer, tmp_path):
    path = tmp_path / "rl.jsonl"
    rows = [
        {"prompt": "a", "reward_model": {"ground_truth": "34"}, "extra_info": {"index": "9a-1"}, "a.b": {"c": [5, 6]}},
        {"prompt": "b", "reward_model": {"ground_truth": 7}, "extra_info": {"index": "9a-2"}, "a.b": None},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fmt = replace(FORMAT, answer_key="reward_model.ground_truth", uid_key="extra_info.index")
    prompts = load_prompts(path, tokenizer, fmt)
    assert [(p.uid, p.name, p.answer) for p in prompts] == [(0, "9a-1", "34"), (1, "9a-2", "7")]
    pq.write_table(pa.Table.from_pylist([{k: r[k] for k in ("prompt", "reward_model", "extra_info")} for r in [rows[0]]]), tmp_path / "p.parquet")  # fmt: skip
    assert list(load_prompts(tmp_path / "p.parquet", tokenizer, fmt)) == [prompts[0]]
    path.write_text(path.read_text() + json.dumps(rows[0]) + "\n")
    assert f"uid '9a-1' is already that of {path}:1" in str(problems(tokenizer, path, fmt))
    assert [prompt.uid for prompt in load_prompts(path, tokenizer, replace(fmt, on_bad_row="skip"))] == [0, 1]


def test_conversations_of_openthoughts(tokenizer, tmp_path):
    """{from, value} messages with the teacher's turn: as a response where the method reads one, else left out."""
    path = tmp_path / "chat.jsonl"
    row = {"domain": "math", "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "yes"}]}
    path.write_text(json.dumps(row) + "\n")
    fmt = replace(CHAT, prompt_key="conversations")
    (with_response,) = load_prompts(path, tokenizer, fmt)
    (without,) = load_prompts(path, tokenizer, replace(fmt, response_key=""))
    assert tokenizer.decode(with_response.teacher_response_ids) == "yes<eos>" and without.teacher_response_ids is None
    assert (
        tokenizer.decode(without.token_ids) == "<user>u<end><assistant>"
        and with_response.token_ids == without.token_ids
    )
    nested = replace(FORMAT, prompt_key="conversations.0.value", response_key="conversations.1.value")
    (raw,) = load_prompts(path, tokenizer, nested)
    assert tokenizer.decode(raw.token_ids) == "u" and raw.teacher_response_ids == with_response.teacher_response_ids


def test_a_data_set_of_the_hub(tokenizer, tmp_path, monkeypatch, plain):
    """Found in the hub's cache, where files are links into a store; its commit is kept with the prompts."""
    repository = tmp_path / "repository" / "data"
    repository.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(ROWS), repository / "train-00000-of-00001.parquet")
    pq.write_table(pa.Table.from_pylist(ROWS[:2]), repository / "test-00000-of-00001.parquet")
    (repository.parent / "README.md").write_text("# rows")
    (repository.parent / "logo.png").write_bytes(b"png")
    fill_cache(tmp_path / "home", "org/rows", repository.parent, repo_type="dataset")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    for name in ("org/rows", "org/rows@main", f"org/rows@{COMMIT}"):
        prompts = load_prompts(f"{name}::train", tokenizer, FORMAT)
        assert list(prompts) == plain and prompts.sources[0].revision == COMMIT
    assert "several splits: train, test" in str(problems(tokenizer, "org/rows"))
    assert "not found" in str(problems(tokenizer, "org/other"))
