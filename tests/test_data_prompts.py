"""Prompt files: every bad row is named, every good row is tokenized once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_tropd.data.prompts import PromptError, PromptFormat, load_prompts
from megatron_tropd.data.reading import readers
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.test_data_tokenizer import save_tokenizer

FORMAT = PromptFormat(max_prompt_length=40, max_response_length=10)
CHAT = replace(FORMAT, chat_template=True)
SKIP = replace(FORMAT, on_bad_row="skip")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


@pytest.fixture
def jsonl(tmp_path):
    def write(*lines, name="p.jsonl"):
        """Objects become JSON, bytes are written as they are; one line each."""
        raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (tmp_path / name).write_bytes(b"".join(line + b"\n" for line in raw))
        return tmp_path / name

    return write


def problems(tokenizer, paths, fmt=FORMAT):
    with pytest.raises(PromptError) as caught:
        load_prompts(paths, tokenizer, fmt)
    return caught.value


def test_raw_rows(jsonl, tokenizer):
    path = jsonl(
        {"prompt": "ab", "response": "xyz", "answer": 42, "domain": "maths", "grader": "choice"},
        {"prompt": "\u00e9", "response": None, "extra": [1]},
        {"prompt": "q", "response": "stops<eos>"},
    )
    first, second, third = load_prompts(path, tokenizer, FORMAT)
    assert tokenizer.decode(first.token_ids) == "ab" and len(first.token_ids) == 2
    assert first.teacher_response_ids[-1] == 0 and tokenizer.decode(first.teacher_response_ids) == "xyz<eos>"
    assert (first.answer, first.domain, first.grader, first.uid) == ("42", "maths", "choice", 0)
    assert len(second.token_ids) == 2 and second.teacher_response_ids is None
    assert (second.answer, second.domain, second.grader) == (None, "", "")
    assert third.teacher_response_ids.count(0) == 1 and third.teacher_response_ids[-1] == 0


def test_stop_token_is_the_teachers(jsonl, tokenizer):
    path = jsonl({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b<eos>"})
    first, second = load_prompts(path, tokenizer, FORMAT, stop_ids=(3, 0))
    assert first.teacher_response_ids[-1] == 3 and second.teacher_response_ids[-1] == 0
    with pytest.raises(ValueError, match="no stop token"):
        load_prompts(path, tokenizer, FORMAT, stop_ids=())


def test_other_keys(jsonl, tokenizer):
    path = jsonl({"q": "ab", "r": "c", "a": "d", "k": "e", "g": "math", "grader": 7})
    fmt = replace(FORMAT, prompt_key="q", response_key="r", answer_key="a", domain_key="k", grader_key="g")
    (prompt,) = load_prompts([path], tokenizer, fmt)
    assert len(prompt.teacher_response_ids) == 2 and (prompt.answer, prompt.domain) == ("d", "e")
    assert prompt.grader == "math"


def test_chat_prompts(jsonl, tokenizer):
    path = jsonl(
        {"prompt": "hi", "response": "yo"},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    )
    first, second = load_prompts(path, tokenizer, CHAT)
    assert tokenizer.decode(first.token_ids) == "<user>hi<end><assistant>"
    assert first.token_ids[0] == 1 and first.token_ids[-1] == 2 and len(first.token_ids) == 5
    assert tokenizer.decode(second.token_ids).endswith("s<end><user>u<end><assistant>")


def test_chat_without_a_template_is_an_error(jsonl, tmp_path):
    plain = load_tokenizer(save_tokenizer(tmp_path / "plain"))
    with pytest.raises(ValueError, match=r"--apply-chat-template.*no chat template"):
        load_prompts(jsonl({"prompt": "hi"}), plain, CHAT)


BAD_ROWS = [
    (b'{"prompt": "a"', "broken JSON", ""),
    (b'["a"]', "a JSON list", ""),
    (b"  ", "an empty line", ""),
    (b"[" * 100_000, "unreadable JSON", ""),
    (b'{"prompt": ' + b"9" * 5000 + b"}", "unreadable JSON", ""),
    (b'{"prompt": "\xff"}', "byte 0xff at offset 12 is not UTF-8", ""),
    ({"question": "a", "b": 1}, "no key 'prompt' (keys: 'question', 'b')", "--prompt-key"),
    ({"prompt": ""}, "prompt is empty", "--prompt-key"),
    ({"prompt": " \n\t"}, "prompt is only whitespace", "--prompt-key"),
    ({"prompt": 7}, "prompt is a int: 7", "--prompt-key"),
    ({"prompt": None}, "prompt is null", "--prompt-key"),
    ({"prompt": [{"role": "user", "content": "a"}]}, "prompt is a list", "--apply-chat-template"),
    ({"prompt": "a\0b"}, "NUL character at index 1", "--prompt-key"),
    ({"prompt": "ab\ud800"}, "lone surrogate at index 2", "--prompt-key"),
    ({"prompt": "x" * 41}, "a prompt of 41 tokens; expected at most --max-prompt-length 40", "--max-prompt-length"),
    ({"prompt": "a", "response": 3}, "response is a int: 3", "--response-key"),
    ({"prompt": "a", "response": ""}, "response is empty", "--response-key"),
    ({"prompt": "a", "response": "x<eos>\n"}, "stop token 0 at token 1 of 3", "--response-key"),
    ({"prompt": "a", "answer": ["x"]}, "answer is a list", "--answer-key"),
    ({"prompt": "a", "answer": True}, "answer is a bool", "--answer-key"),
    ({"prompt": "a", "answer": "\udfff"}, "lone surrogate", "--answer-key"),
    ({"prompt": "a", "domain": 1.5e300, "uid": -1}, "uid -1", "--uid-key"),
    ({"prompt": "a", "uid": 1 << 43}, f"uid {1 << 43}", "--uid-key"),
    ({"prompt": "a", "uid": 1.5}, "uid is a float: 1.5", "--uid-key"),
    ({"prompt": "a", "uid": ""}, "uid ''", "--uid-key"),
    (b'{"prompt": "a", "answer": NaN}', "answer is nan", "--answer-key"),
    (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' twice in one object", ""),
]


@pytest.mark.parametrize(("line", "found", "flag"), BAD_ROWS, ids=[found for _, found, _ in BAD_ROWS])
@pytest.mark.fault(number=25)
def test_bad_row_is_named_with_its_line(jsonl, tokenizer, line, found, flag):
    path = jsonl({"prompt": "good"}, line, {"prompt": "good"})
    error = problems(tokenizer, path)
    assert [row.line for row in error.rows] == [2]
    assert f"{path}:2: " in str(error) and found in str(error) and error.rows[0].flag == flag
    assert str(error).isascii() and len(str(error)) < 1000
    kept = load_prompts(path, tokenizer, SKIP)
    assert [row.line for row in kept.skipped] == [2]
    assert [prompt.uid for prompt in kept] == [0, 2]


BAD_CHATS = [
    ([], "prompt is an empty list"),
    ({"role": "user"}, "prompt is a dict"),
    (["hi"], "message 0 is a str"),
    ([{"role": "user"}], "content of message 0 is null"),
    ([{"role": "user", "content": "a"}, {"role": "user", "content": " "}], "content of message 1 is only whitespace"),
    ([{"role": 1, "content": "a"}], "role of message 0 is a int"),
    ([{"role": "assistant", "content": "b"}], "the only message is the assistant's"),
    ([{"role": "wizard", "content": "a"}], "unknown role wizard"),
]


@pytest.mark.parametrize(("prompt", "found"), BAD_CHATS, ids=[found for _, found in BAD_CHATS])
def test_bad_chat_is_named_with_its_line(jsonl, tokenizer, prompt, found):
    error = problems(tokenizer, jsonl({"prompt": "good"}, {"prompt": prompt}), CHAT)
    assert [row.line for row in error.rows] == [2] and found in str(error)


def test_byte_order_mark_and_carriage_returns_are_accepted(jsonl, tokenizer):
    path = jsonl(b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r')
    assert [len(prompt.token_ids) for prompt in load_prompts(path, tokenizer, FORMAT)] == [1, 1]
    path.write_bytes(b'{"prompt": "no newline at the end"}')
    assert len(load_prompts(path, tokenizer, FORMAT)) == 1


def test_huge_line_keeps_the_line_numbers(jsonl, tokenizer, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 64)
    exact = b'{"prompt": "a"}'.ljust(64)
    error = problems(tokenizer, jsonl(exact, b"x" * 1000, {"prompt": ""}, {"prompt": "b"}))
    assert [row.line for row in error.rows] == [2, 3] and "more than 64 bytes" in str(error)


def test_uids(jsonl, tokenizer):
    one = jsonl({"prompt": "a"}, {"prompt": "b"}, name="one.jsonl")
    two = jsonl({"prompt": "c"}, {"prompt": "d", "uid": 99}, {"prompt": "e", "uid": "text"}, name="two.jsonl")
    prompts = load_prompts([one, two], tokenizer, FORMAT)
    assert [(prompt.uid, prompt.name) for prompt in prompts] == [(0, ""), (1, ""), (2, ""), (99, ""), (4, "text")]
    again = jsonl({"prompt": "a", "uid": 5}, {"prompt": "b"}, {"prompt": "c", "uid": 5}, name="again.jsonl")
    error = problems(tokenizer, again)
    assert [row.line for row in error.rows] == [3] and f"uid 5 is already that of {again}:1" in str(error)


def test_all_bad_rows_are_collected_and_twenty_shown(jsonl, tokenizer):
    path = jsonl({"prompt": "good"}, *[{"prompt": ""}] * 30)
    error = problems(tokenizer, path)
    assert len(error.rows) == 30 and "30 problems" in str(error) and "and 10 more" in str(error)
    assert ":21: " in str(error) and ":22: " not in str(error) and "--on-bad-row skip" in str(error)
    assert len(load_prompts(path, tokenizer, SKIP).skipped) == 30


@pytest.mark.fault(number=25)
def test_unusable_files_are_errors_in_both_modes(jsonl, tokenizer, tmp_path):
    empty = jsonl(name="empty.jsonl")
    bom = jsonl(name="bom.jsonl")
    bom.write_bytes(b"\xef\xbb\xbf")
    good = jsonl({"prompt": "a"}, name="good.jsonl")
    (tmp_path / "rows.csv").write_text("prompt\na\n")
    (tmp_path / "folder.jsonl").mkdir()
    paths = [empty, bom, good, tmp_path / "rows.csv", tmp_path / "folder.jsonl", tmp_path / "missing.jsonl"]
    for fmt in (FORMAT, SKIP):
        error = problems(tokenizer, paths, fmt)
        assert [row.line for row in error.rows] == [0] * 5
        assert all(row.flag == "--prompt-data" for row in error.rows) and "--on-bad-row" not in str(error)
        for text in ("empty.jsonl: file has no prompts", "bom.jsonl: file has no", "'.csv'", "a directory", "no such"):
            assert text in str(error)
    with pytest.raises(ValueError, match="--prompt-data"):
        load_prompts([], tokenizer, FORMAT)


def test_skipping_every_row_is_an_error(jsonl, tokenizer):
    path = jsonl({"prompt": ""}, {"prompt": ""})
    assert [row.line for row in problems(tokenizer, path).rows] == [1, 2]
    error = problems(tokenizer, path, SKIP)
    assert "file has no prompts (2 bad rows)" in str(error) and [row.line for row in error.rows] == [0, 1, 2]


def test_digest_changes_with_the_data_only(jsonl, tokenizer):
    def of(*lines):
        return load_prompts(jsonl(*lines), tokenizer, FORMAT).digest

    base = of({"prompt": "ab"}, {"prompt": "c"})
    assert base == of({"prompt": "ab", "extra": 1}, {"prompt": "c", "response": None})
    changed = {
        of({"prompt": "a"}, {"prompt": "bc"}),
        of({"prompt": "c"}, {"prompt": "ab"}),
        of({"prompt": "ab"}, {"prompt": "c", "response": "x"}),
        of({"prompt": "ab"}, {"prompt": "c", "uid": 7}),
    }
    assert base not in changed and len(changed) == 4


def test_format_refuses_nonsense():
    with pytest.raises(ValueError, match="--max-prompt-length 0"):
        PromptFormat(max_prompt_length=0, max_response_length=1)
    with pytest.raises(ValueError, match="--on-bad-row"):
        PromptFormat(max_prompt_length=1, max_response_length=1, on_bad_row="ignore")
