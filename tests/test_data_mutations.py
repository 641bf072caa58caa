"""Thousands of mutated data files: a row is read as it stands or reported with its line, and touches no other row."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import replace
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tropd.data.prompts import PromptError, load_prompts
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.test_data_prompts import FORMAT
from tests.test_data_tokenizer import CHAT_TEMPLATE, save_tokenizer

SKIP = replace(FORMAT, on_bad_row="skip")
CHAT = replace(SKIP, chat_template=True)
ROWS_A_FILE = 120
GOOD = {"prompt": "good", "response": "fine", "answer": "8", "domain": "d"}
TEXTS = [
    "", " ", "\n", "a", "\u00e9\u4e2d", "a\0b", "x" * 41, "<eos>", "a<eos>b", "<think>", "</think>", "nan", "[]", "{}",
    "\u2028", "\ufeff", "{{ 7 * 7 }}", "{% raise %}", "\x1b[2J", "3", "true", "null", "<end>", "\\boxed{1}", "b<eos>",
    "a\ud800", '[{"role": "user", "content": "c"}]',
]  # fmt: skip
OTHERS = [None, True, False, 0, -1, 3, 900, 1 << 43, -(1 << 70), 1.5, 3.0, 1e308, -0.0, [], {}, [None], {"a": "b"},
          float("nan"), float("inf")]  # fmt: skip
KEYS = [*GOOD, "prompt", "prompt", "uid", "tools", "Prompt", "prompt ", ""]
MESSAGE = {
    "role": ["user", "assistant", "system", "tool", "wizard"], "from": ["human", "gpt", "narrator"], "content": TEXTS,
    "value": TEXTS, "tool_calls": [[{"name": "f"}], None], "name": ["n", None],
}  # fmt: skip


def scalar(draw: Random):
    return draw.choice(TEXTS if draw.random() < 0.6 else OTHERS)


def message(draw: Random):
    """Mostly a good message, sometimes one with a key too few, too many or of another type."""
    text = draw.choice(["a", "b c", draw.choice(TEXTS)])
    content = draw.choice([text, text, [{"type": "text", "text": text}], scalar(draw)])
    good = {"role": draw.choice(["user", "assistant", "system"]), "content": content}
    if draw.random() < 0.3:
        good = {"from": draw.choice(["human", "gpt", "system"]), "value": content}
    if draw.random() < 0.2:
        key = draw.choice(list(MESSAGE))
        good[key] = draw.choice([draw.choice(MESSAGE[key]), scalar(draw)])
    if draw.random() < 0.1:
        good.pop(draw.choice(list(good)))
    return good


def nested(draw: Random, depth: int = 3):
    if depth == 0 or draw.random() < 0.4:
        return scalar(draw)
    inner = [nested(draw, depth - 1) for _ in range(draw.randrange(3))]
    return inner if draw.random() < 0.5 else {draw.choice(TEXTS): value for value in inner}


def value(draw: Random):
    kind = draw.random()
    if kind < 0.6:
        return scalar(draw)
    return [message(draw) for _ in range(draw.randrange(4))] if kind < 0.85 else nested(draw)


def mutated(draw: Random):
    """One row: keys changed, added or left out, or something that is no row."""
    kind = draw.random()
    if kind < 0.05:
        return value(draw)
    if kind < 0.15:
        left_out = draw.choice(list(GOOD))
        return {name: text for name, text in GOOD.items() if name != left_out}
    return {**GOOD, **{draw.choice(KEYS): value(draw) for _ in range(draw.choice([1, 1, 1, 2, 3]))}}


def mutated_rows(seed: int):
    draw = Random(seed)
    return [GOOD, *(mutated(draw) for _ in range(ROWS_A_FILE)), GOOD]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


@pytest.fixture
def fresh(tmp_path):
    """A new path for each example."""
    numbers = itertools.count()
    return lambda suffix: tmp_path / f"{next(numbers)}{suffix}"


def load(path, tokenizer, fmt):
    """The prompts by uid and the lines of bad rows; None where a whole file is refused."""
    try:
        prompts = load_prompts(path, tokenizer, fmt, cache_root=path.parent / "cache")
    except PromptError as error:
        assert str(error).isascii() and path.name in str(error)
        return None
    return {prompt.uid: prompt for prompt in prompts}, {row.line for row in prompts.skipped}


def check_raw(tokenizer, row, prompt):
    """A prompt that was accepted says what its row says."""
    assert tokenizer.decode(prompt.token_ids) == row["prompt"]
    response = row.get("response")
    if response is None:
        assert prompt.teacher_response_ids is None
    else:
        ids = prompt.teacher_response_ids if prompt.is_cut else prompt.teacher_response_ids[:-1]
        text = tokenizer.decode(ids)
        assert 0 not in ids and (response.startswith(text) if prompt.is_cut else response.removesuffix("<eos>") == text)
    answer, uid = row.get("answer"), row.get("uid")
    assert prompt.answer == (None if answer is None else str(answer)) and not isinstance(answer, bool)
    assert prompt.domain == str(row.get("domain") or "") or row["domain"] in (0, -0.0)
    assert uid is None or (isinstance(uid, int) and prompt.uid == uid) or prompt.name == uid


def check_chat(tokenizer, row, prompt):
    """Every text of the messages is in the rendered prompt, or in the response."""
    text = tokenizer.decode(prompt.token_ids)
    given = row["prompt"]
    if isinstance(given, str) and given.startswith("[{"):  # messages as JSON text
        given = json.loads(given)
    messages = given if isinstance(given, list) else [{"content": given}]
    seen = text + tokenizer.decode(prompt.teacher_response_ids or ())
    for message in messages:
        content = message.get("content", message.get("value"))
        parts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
        assert all(part in seen or prompt.is_cut for part in parts), (row, seen)
    assert text.endswith("<assistant>") and text.count("<end>") >= 1


def check_file(tokenizer, rows, result, check):
    """Each row is a prompt that says what it says, or is reported with its line; good rows are always prompts."""
    assert result is not None
    prompts, bad = result
    seen = {prompt_uid(row, number): number for number, row in reversed(list(enumerate(rows)))}
    for number, row in enumerate(rows):
        uid = prompt_uid(row, number)
        if number + 1 in bad:
            assert row is not GOOD or seen[uid] != number
            continue
        assert uid in prompts, (number, row)
        check(tokenizer, row, prompts[uid])
    assert len(prompts) + len(bad) == len(rows)


def prompt_uid(row, number):
    uid = row.get("uid") if isinstance(row, dict) else None
    return uid if isinstance(uid, int) and not isinstance(uid, bool) else number


@pytest.mark.parametrize("seed", range(12))
def test_mutated_rows(tokenizer, fresh, seed):
    rows = mutated_rows(seed)
    for suffix, content in ((".jsonl", "\n".join(map(json.dumps, rows))), (".json", json.dumps(rows))):
        path = fresh(suffix)
        path.write_text(content)
        check_file(tokenizer, rows, load(path, tokenizer, SKIP), check_raw)


@pytest.mark.parametrize("seed", range(12, 20))
def test_mutated_chat_rows(tokenizer, fresh, seed):
    rows = mutated_rows(seed)
    path = fresh(".jsonl")
    path.write_text("\n".join(map(json.dumps, rows)))
    check_file(tokenizer, rows, load(path, tokenizer, CHAT), check_chat)


TEMPLATES = [
    "{{ messages[0]['content'] }}",
    "{{ 1 / 0 }}",
    "{{ messages.x.y }}",
    "{{ tools[0] }}",
    "{{ messages | tojson }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_that_fail(tokenizer, fresh, template):
    path = fresh(".jsonl")
    path.write_text("\n".join(map(json.dumps, mutated_rows(20))))
    tokenizer.chat_template = template
    try:
        load(path, tokenizer, CHAT)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE


@pytest.mark.parametrize("key", GOOD)
def test_mutated_parquet(tokenizer, fresh, key):
    texts = [text for text in TEXTS if text.isprintable() or text.isspace()]
    rows = [GOOD, *({**GOOD, key: text} for text in [None, *texts]), GOOD]
    path = fresh(".parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(dict.fromkeys(GOOD, pa.string()))), path)
    check_file(tokenizer, rows, load(path, tokenizer, SKIP), check_raw)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_mutated_bytes(tokenizer, fresh, suffix):
    """Bytes are changed, cut out or put in: no other error, and what is read was there."""
    rows = [{**GOOD, "prompt": f"good {number}"} for number in range(8)]
    path = fresh(suffix)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode(), mtime=0) if suffix.endswith(".gz") else text.encode())
    raw, draw = path.read_bytes(), Random(suffix)
    for _ in range(100):
        start = draw.randrange(len(raw))
        stop = min(len(raw), start + draw.choice([0, 0, 1, 3, 40]))
        insert = draw.choice([draw.randbytes(2), b"", b"\n", b'"', b"\xff", b"{", b"\x00", b"[" * 3000])
        path = fresh(suffix)
        path.write_bytes(raw[:start] + insert + raw[stop:])
        result = load(path, tokenizer, SKIP)
        if result is not None and suffix == ".jsonl":
            lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
            for prompt in result[0].values():
                check_raw(tokenizer, json.loads(lines[prompt.uid]), prompt)
