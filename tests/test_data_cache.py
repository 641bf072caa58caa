"""The token cache: made once, by whoever is there, whole or not at all, and mapped into memory afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_tropd.data import prompt_source
from megatron_tropd.data.prompt_source import PromptSource
from megatron_tropd.data.prompts import digest, load_prompts
from megatron_tropd.data.reading import spans
from megatron_tropd.data.token_cache import shard
from megatron_tropd.data.token_cache.build import CacheError
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.test_data_prompts import FORMAT, SKIP, problems
from tests.test_data_tokenizer import CHAT_TEMPLATE, save_tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def rows(tmp_path):
    """A file of 40 rows, some without a response, some with a cut one."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"row {n}", "response": "x" * n if n % 3 else None, "answer": n if n % 2 else None})
            + "\n"
            for n in range(40)
        )
    )
    return path


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(spans, "SPAN_BYTES", 400)
    monkeypatch.setattr(shard, "BATCH_ROWS", 3)
    monkeypatch.setattr("megatron_tropd.data.token_cache.tokens.BATCH_ROWS", 3)
    monkeypatch.setattr("megatron_tropd.data.token_cache.finish.BATCH_ROWS", 3)


def encode_counter(monkeypatch):
    """Counts the rows that are encoded from now on."""
    counts = []
    encode = shard.Encoder.encode

    def counting(self, rows):
        counts.append(len(rows))
        return encode(self, rows)

    monkeypatch.setattr(shard.Encoder, "encode", counting)
    return counts


def test_rows_are_encoded_once(tokenizer, rows, tmp_path, monkeypatch):
    counts = encode_counter(monkeypatch)
    first = load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "cache")
    assert sum(counts) == 40
    again = load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "cache")
    assert sum(counts) == 40 and list(again) == list(first) and again.digest == first.digest == digest(list(first))
    skip = load_prompts(rows, tokenizer, SKIP, cache_root=tmp_path / "cache")
    assert sum(counts) == 40 and list(skip) == list(first)  # what to do with bad rows changes no token


def test_whatever_changes_a_token_is_another_cache(tokenizer, rows, tmp_path, monkeypatch):
    counts = encode_counter(monkeypatch)

    def load(**changes):
        tokens = changes.pop("tokenizer", tokenizer)
        stop_ids = changes.pop("stop_ids", None)
        load_prompts(rows, tokens, replace(FORMAT, **changes), stop_ids=stop_ids, cache_root=tmp_path / "cache")
        return sum(counts)

    assert load() == 40 and load() == 40
    with_template = load_tokenizer(save_tokenizer(tmp_path / "chat", chat=True))
    other_template = load_tokenizer(save_tokenizer(tmp_path / "other", chat=True))
    other_template.chat_template = CHAT_TEMPLATE.replace("<end>", "")
    changes = (
        {"response_key": ""}, {"answer_key": "response"}, {"grader_key": "answer"}, {"max_response_length": 11}, {"stop_ids": (3, 0)},
        {"tokenizer": with_template, "chat_template": True}, {"tokenizer": other_template, "chat_template": True},
    )  # fmt: skip
    for number, change in enumerate(changes, start=2):
        assert load(**change) == 40 * number
    text = rows.read_text()
    rows.write_text(text.replace("row 1", "row 2"))  # of the same size
    assert load() == 40 * 9


def test_parts_and_batches_change_nothing(tokenizer, rows, tmp_path, small_parts):
    whole = load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "parts")
    assert len(whole.summary.kept) > 5 and len(list(whole.directory.glob("*.arrow"))) == len(whole.summary.kept)
    prompts = list(whole)
    assert len(prompts) == len(whole) == 40 and [prompt.uid for prompt in prompts] == list(range(40))
    assert tokenizer.decode(prompts[27].token_ids) == "row 27" and digest(prompts) == whole.digest
    assert whole[-1] == prompts[-1] and whole[3:9:2] == prompts[3:9:2]
    assert whole.summary.num_responses == sum(p.teacher_response_ids is not None for p in prompts) == 26
    assert whole.summary.num_cut == sum(p.is_cut for p in prompts) == 19
    assert whole.summary.num_answers == sum(p.answer is not None for p in prompts) == 20
    with pytest.raises(IndexError):
        whole[40]


def test_prompts_by_uid(tokenizer, tmp_path, small_parts):
    path = tmp_path / "uids.jsonl"
    uids = [5, 900, None, 7, "a", None, 1, 5, "b", "a", 900]
    path.write_text("".join(json.dumps({"prompt": f"p{n}", "uid": uid}) + "\n" for n, uid in enumerate(uids)))
    kept = load_prompts(path, tokenizer, SKIP, cache_root=tmp_path / "cache")
    # Row 5 has no uid, so its number is its uid, which row 0 gave.
    assert [(row.line, row.found.split(" is ")[0]) for row in kept.skipped] == [
        (6, "uid 5"), (8, "uid 5"), (10, "uid 'a'"), (11, "uid 900"),
    ]  # fmt: skip
    assert f"already that of {path}:1" in kept.skipped[0].found
    assert [prompt.uid for prompt in kept] == [5, 900, 2, 7, 4, 1, 8]
    for prompt in kept:
        assert kept.by_uid[prompt.uid] == prompt
    for unknown in (0, 3, 6, 901, -1):
        assert unknown not in kept.by_uid
    again = load_prompts(path, tokenizer, SKIP, cache_root=tmp_path / "cache")
    assert list(again) == list(kept) and again.skipped == kept.skipped


def test_a_damaged_cache_is_made_again(tokenizer, rows, tmp_path, small_parts, monkeypatch):
    whole = load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "cache")
    expected, counts = list(whole), encode_counter(monkeypatch)
    (whole.directory / "00002.arrow").write_bytes(b"short")
    (whole.directory / "00004.json").write_text("{")
    assert list(load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "cache")) == expected
    assert sum(counts) == whole.summary.kept[2] + whole.summary.kept[4]
    (whole.directory / "summary.json").write_text('{"kept": 3}')
    assert list(load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "cache")) == expected


def test_where_tokens_cannot_be_stored(tokenizer, rows, tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match=r"--data-cache-path .*cannot be stored there"):
            load_prompts(rows, tokenizer, FORMAT, cache_root=root)


def test_many_bad_rows_are_counted_and_some_kept(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(shard, "MAX_DETAILS", 5)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n' + '{"prompt": ""}\n' * 30)
    error = problems(tokenizer, path)
    assert len(error.rows) == 5 and error.count == 30 and "30 problems" in str(error) and "and 25 more" in str(error)


def test_the_order_of_large_data_is_on_disk(tokenizer, rows, tmp_path, monkeypatch):
    prompts = load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "cache")
    expected = PromptSource(list(prompts), seed=3).take(100)
    monkeypatch.setattr(prompt_source, "_IN_MEMORY", 10)
    prompt_source._order.cache_clear()
    assert PromptSource(prompts, seed=3).take(100) == expected
    assert [path.name for path in sorted(prompts.directory.glob("order-*"))] == [
        f"order-3-{epoch}.npy" for epoch in range(3)
    ]
    prompt_source._order.cache_clear()
    assert PromptSource(prompts, seed=3).take(100) == expected
    assert isinstance(prompt_source._order(3, 0, 40, prompts.directory), np.memmap)


WORKER = """
import os, signal, sys
from pathlib import Path
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd import atomic_files
from megatron_tropd.data.reading import spans
from megatron_tropd.data.token_cache import build
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.test_data_prompts import FORMAT

tokens, rows, root, die_at = sys.argv[1:]
spans.SPAN_BYTES = 400
make, made = build.make_shard, []

def watched(directory, index, span, encoder):
    if len(made) == int(die_at):
        with atomic_files.replacing(directory / f"{index:05d}.arrow") as half:
            half.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
    make(directory, index, span, encoder)
    made.append(index)

build.make_shard = watched
prompts = load_prompts(rows, load_tokenizer(tokens), FORMAT, cache_root=Path(root))
print(len(made), prompts.digest)
"""


@pytest.mark.slow
def test_processes_share_the_work_and_one_that_is_killed_loses_only_its_part(tokenizer, rows, tmp_path):
    tokens = save_tokenizer(tmp_path / "tokens")
    whole = load_prompts(rows, tokenizer, FORMAT, cache_root=tmp_path / "whole")

    def start(rank, die_at):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), "WORLD_SIZE": "3"}
        argv = [sys.executable, "-W", "ignore", "-c", WORKER, tokens, rows, tmp_path / "cache", str(die_at)]
        return subprocess.Popen(list(map(str, argv)), env=env, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    first = start(0, 2)
    first.communicate(timeout=300)
    assert first.returncode == -signal.SIGKILL
    both = [start(1, -1), start(2, -1)]
    outputs = [process.communicate(timeout=300)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert {output[1] for output in outputs} == {whole.digest}
    (directory,) = (tmp_path / "cache").iterdir()
    assert sum(int(output[0]) for output in outputs) == len(list(directory.glob("*.arrow"))) - 2
    assert not list(directory.glob(".*"))


def test_a_file_by_another_name_is_reported_by_that_name(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    (tmp_path / "link.jsonl").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in (str(path), str(tmp_path / "link.jsonl"), "bad.jsonl"):
        assert [row.path for row in problems(tokenizer, name).rows] == [name]
