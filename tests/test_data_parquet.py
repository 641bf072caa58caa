"""Prompts from Parquet files: the same checks, row numbers instead of lines."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.test_data_prompts import CHAT, FORMAT, SKIP, problems
from tests.test_data_tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


def test_parquet(tokenizer, tmp_path):
    path = tmp_path / "p.parquet"
    records = [
        {"prompt": "ab", "response": "c", "answer": 3, "uid": 10, "junk": [1]},
        {"prompt": " ", "response": None, "answer": None, "uid": None, "junk": None},
        {"prompt": "d", "response": None, "answer": None, "uid": None, "junk": None},
    ]
    pq.write_table(pa.Table.from_pylist(records), path)
    kept = load_prompts(path, tokenizer, SKIP)
    assert [(prompt.uid, prompt.answer) for prompt in kept] == [(10, "3"), (2, None)]
    assert [(row.line, row.found) for row in kept.skipped] == [(2, "prompt is only whitespace")]
    error = problems(tokenizer, path, replace(FORMAT, prompt_key="question", response_key="r", answer_key="a"))
    assert [row.line for row in error.rows] == [1, 2, 3] and "'junk'" in str(error)


def test_parquet_chat_messages(tokenizer, tmp_path):
    path = tmp_path / "p.parquet"
    messages = [{"role": "user", "content": "u", "name": None}, {"role": "system", "content": "s", "name": "n"}]
    pq.write_table(pa.Table.from_pylist([{"prompt": messages}]), path)
    (prompt,) = load_prompts(path, tokenizer, CHAT)
    assert tokenizer.decode(prompt.token_ids).startswith("<user>u<end>")


def test_parquet_faults(tokenizer, tmp_path):
    path = tmp_path / "p.parquet"
    dirty = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"prompt": dirty}), path)
    error = problems(tokenizer, path)
    assert [row.line for row in error.rows] == [2] and "0xff at offset 0 is not UTF-8" in str(error)
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert "file has no prompts" in str(problems(tokenizer, path))
    path.write_bytes(b"not parquet at all")
    assert "unreadable Parquet" in str(problems(tokenizer, path))
