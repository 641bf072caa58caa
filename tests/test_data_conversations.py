"""Chat rows in the shapes that data sets have them, long responses, and the seam of prompt and response."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_tropd.data.encoding.conversation import read_conversation
from megatron_tropd.data.encoding.row_format import Fault
from megatron_tropd.data.encoding.thinking import TAGS, check_thinking
from megatron_tropd.data.prompts import load_prompts
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.test_data_prompts import CHAT, FORMAT, problems
from tests.test_data_tokenizer import CHAT_TEMPLATE, save_tokenizer

USER = {"role": "user", "content": "u"}


@pytest.fixture
def tokenizer(tmp_path):
    return load_tokenizer(save_tokenizer(tmp_path / "tokenizer", chat=True))


def written(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SAME = {
    "text": "u",
    "messages": [USER],
    "from and value": [{"from": "human", "value": "u"}],
    "speaker in capitals": [{"from": "Human", "value": "u"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "u"}]}],
    "lists in a mapping": {"role": ["user"], "content": ["u"]},
    "messages as JSON text": json.dumps([USER]),
    "null keys of Parquet": [{**USER, "name": None, "tool_calls": None}],
}


@pytest.mark.parametrize("prompt", SAME.values(), ids=SAME)
def test_shapes_of_one_conversation(tokenizer, tmp_path, prompt):
    (prompt,) = load_prompts(written(tmp_path, {"prompt": prompt}), tokenizer, CHAT)
    assert tokenizer.decode(prompt.token_ids) == "<user>u<end><assistant>"


def test_text_that_only_looks_like_messages_is_text():
    for text in ("[1, 2]", "[", '[{"role": 1}]', "[]", '["a"]'):
        assert read_conversation(text).messages == ({"role": "user", "content": text},)


def test_an_empty_system_message_is_rendered(tokenizer, tmp_path):
    rows = [{"prompt": [{"role": "system", "content": ""}, USER]}]
    (prompt,) = load_prompts(written(tmp_path, *rows), tokenizer, CHAT)
    assert tokenizer.decode(prompt.token_ids) == "<system><end><user>u<end><assistant>"


REFUSED = [
    ([{"from": "narrator", "value": "u"}], "message 0 is from 'narrator'"),
    ([{"from": "human", "content": "u"}], "message 0 has the keys"),
    ([{"from": "human", "value": "u", "role": "user"}], "message 0 has the keys"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a part of type 'image'"),
    ([{"role": "user", "content": ["u"]}], "a part of type 'str'"),
    ({"role": ["user"], "content": []}, "lists of different lengths"),
    ([USER, {"role": "assistant", "content": None}], "content of message 1 is null"),
    ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}], "the reply at the end calls tools"),
    ([USER, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, USER], "the prompt has tool_calls"),
]


@pytest.mark.parametrize(("prompt", "found"), REFUSED, ids=[found for _, found in REFUSED])
def test_what_the_model_would_not_see_as_it_is_meant_is_refused(tokenizer, tmp_path, prompt, found):
    assert found in str(problems(tokenizer, written(tmp_path, {"prompt": prompt}), CHAT))


def test_two_responses_are_refused(tokenizer, tmp_path):
    row = {"prompt": [USER, {"role": "assistant", "content": "yes"}], "response": "no"}
    assert "a response, and messages that end with another" in str(problems(tokenizer, written(tmp_path, row), CHAT))


def test_tools_are_rendered_or_refused(tokenizer, tmp_path):
    rows = [{"prompt": [USER], "tools": tools} for tools in ([{"name": "f"}], '[{"name": "f"}]')]
    assert "the prompt has tools" in str(problems(tokenizer, written(tmp_path, *rows), CHAT))
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.name }} {% endfor %}" + CHAT_TEMPLATE
    first, second = load_prompts(written(tmp_path, *rows), tokenizer, CHAT)
    assert tokenizer.decode(first.token_ids) == "f <user>u<end><assistant>" and first.token_ids == second.token_ids
    bad = written(tmp_path, {"prompt": [USER], "tools": "f"})
    assert "--tools-key" in str(problems(tokenizer, bad, CHAT))
    none = written(tmp_path, *({"prompt": [USER], "tools": tools} for tools in ([], None, "", "[]")))
    assert len({prompt.token_ids for prompt in load_prompts(none, tokenizer, CHAT)}) == 1


def test_a_long_response_gives_its_first_tokens(tokenizer, tmp_path):
    path = written(tmp_path, {"prompt": "a", "response": "x" * 10}, {"prompt": "a", "response": "x" * 25})
    prompts = load_prompts(path, tokenizer, FORMAT)
    whole, cut = prompts
    assert len(whole.teacher_response_ids) == whole.whole_response_len == 11 and not whole.is_cut
    assert cut.teacher_response_ids == whole.teacher_response_ids[:10] and cut.whole_response_len == 26 and cut.is_cut
    assert prompts.summary.num_cut == 1 and prompts.summary.num_responses == 2
    skipping = load_prompts(path, tokenizer, replace(FORMAT, on_long_response="skip"))
    assert [prompt.uid for prompt in skipping] == [0] and skipping.summary.num_dropped == 1
    assert "a teacher response of 25 tokens" in str(
        problems(tokenizer, path, replace(FORMAT, on_long_response="error"))
    )
    only = written(tmp_path, {"prompt": "a", "response": "x" * 25})
    assert "1 with too long a response" in str(problems(tokenizer, only, replace(FORMAT, on_long_response="skip")))


def test_responses_that_are_not_used_are_not_read(tokenizer, tmp_path):
    path = written(tmp_path, {"prompt": "a", "response": 7}, {"prompt": "a", "response": "<eos><eos>"})
    assert len(problems(tokenizer, path).rows) == 2
    prompts = load_prompts(path, tokenizer, replace(FORMAT, response_key=""))
    assert [prompt.teacher_response_ids for prompt in prompts] == [None, None]


@pytest.mark.parametrize(("opening", "closing"), TAGS, ids=[opening for opening, _ in TAGS])
def test_thinking_tags_at_the_seam(opening, closing):
    for prompt, response in (
        (f"q {opening}\n", f"hm {closing} 8"),  # the template opens
        ("q ", f"{opening}hm{closing} 8"),  # the response opens
        (f"q {opening}\n\n{closing}\n\n", "8"),  # the template opens and closes
        ("q ", "8"),
        (f"q {opening}", "a thought that was cut"),
        (f"what is {opening}? ", "it opens a thought"),
    ):
        check_thinking(prompt, response)
    for prompt, response, found in (
        (f"q {opening}\n", f"\n{opening}hm{closing} 8", "twice"),
        (f"q {opening}{closing}\n", f"{opening}hm{closing} 8", "after"),
        (f"q {opening}{closing}\n", f"hm {closing} 8", "twice"),
        ("q ", f"hm {closing} 8", "without"),
    ):
        with pytest.raises(Fault) as caught:
            check_thinking(prompt, response)
        assert found in caught.value.found and "rendered" in caught.value.found and opening in caught.value.found


def test_a_doubled_tag_is_found_in_the_rows(tokenizer, tmp_path):
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>", "<assistant><think>\n")
    path = written(tmp_path, {"prompt": "u", "response": "<think>\nhm"})
    error = str(problems(tokenizer, path, CHAT))
    assert r"'<user>u<end><assistant><think>\n' + '<think>\nhm'" in error and "--response-key" in error
