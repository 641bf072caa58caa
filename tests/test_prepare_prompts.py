"""tools/prepare_prompts.py on each published form of data: the rows that it writes, word for word."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import datasets
import pytest

from megatron_tropd.data.prompts import PromptFormat, load_prompts
from megatron_tropd.data.tokenizer import load_tokenizer
from tests.hub_helpers import COMMIT, fill_cache
from tests.prompt_files import prepare, report_of, rl_row, user, write_rows
from tests.test_data_tokenizer import save_tokenizer

CHAT = PromptFormat(chat_template=True, max_prompt_length=200, max_response_length=100)


def uid(*messages):
    """The uid of a conversation whose messages are in lower case and have single spaces already."""
    state = "".join(f"{role}\x1f{text}\x1e" for role, text in messages).encode()
    return hashlib.blake2b(state, digest_size=10).hexdigest()


def without_uids(rows):
    return [{key: value for key, value in row.items() if key != "uid"} for row in rows]


# ---- OpenThoughts3 ----


def openthoughts(text, reply, domain="math", difficulty=None):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": reply}]
    return {"difficulty": difficulty, "source": "s", "domain": domain, "conversations": turns}


OPENTHOUGHTS = [
    openthoughts("What is  1 + 1?", "<think>easy</think> 2"),
    openthoughts("Print 1.", "<think>x</think> print(1)", domain="code", difficulty=6),
    openthoughts("Why is the sky blue?", "<think>y</think> Rayleigh", domain="science"),
]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_openthoughts3(tmp_path, suffix, capsys):
    data = write_rows(tmp_path / f"rows{suffix}", OPENTHOUGHTS)
    rows = prepare(data, tmp_path / "out", "--domains", "math", "science")
    assert rows == [
        {"prompt": user("What is  1 + 1?"), "domain": "math", "uid": uid(("user", "what is 1 + 1?"))},
        {"prompt": user("Why is the sky blue?"), "domain": "science", "uid": uid(("user", "why is the sky blue?"))},
    ]
    assert "--format openthoughts3, by the columns" in capsys.readouterr().err
    with_responses = prepare(data, tmp_path / "again", "--responses")
    assert [row["response"] for row in with_responses] == [row["conversations"][1]["value"] for row in OPENTHOUGHTS]


# ---- verl ----


def test_dapo(tmp_path):
    rows = [rl_row("Q one", "34", "9a9b6eb4"), rl_row("Q two", "-1/2", "7f00")]
    assert without_uids(prepare(write_rows(tmp_path / "dapo.parquet", rows), tmp_path / "out")) == [
        {"prompt": user("Q one"), "answer": "34", "grader": "math", "domain": "math", "source_uid": "9a9b6eb4"},
        {"prompt": user("Q two"), "answer": "-1/2", "grader": "math", "domain": "math", "source_uid": "7f00"},
    ]


def test_skywork(tmp_path):
    functional = {"fn_name": "add", "inputs": ["1\n2", "3\n4"], "outputs": ["3", "7"]}
    stdin = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
    asserts = {"import_prefix": "import math\n", "test_code": "def check(f): ...", "entry_point": "f"}
    rows = [
        rl_row("M", '["18"]', 5, "math", "train-math-numinamath"),
        rl_row("F", json.dumps(functional), 5, "code", "train-code-taco"),
        rl_row("S", json.dumps(stdin), 6, "code", "train-code-taco"),
        rl_row("A", json.dumps(asserts), 7, "code", "train-code-leetcode"),
    ]
    for row in rows:
        row["prompt"] = json.dumps(row["prompt"])  # verl reads a JSON text too
    written = prepare(write_rows(tmp_path / "skywork.jsonl", rows), tmp_path / "out", "--domain-key", "data_source",
                      "--domain-map", "train-math-numinamath=math", "train-code-taco=code", "train-code-leetcode=code")  # fmt: skip
    tests = [
        [{"input": "1\n2", "output": "3", "testtype": "functional", "func_name": "add"},
         {"input": "3\n4", "output": "7", "testtype": "functional", "func_name": "add"}],
        [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}],
    ]  # fmt: skip
    assert without_uids(written) == [
        {"prompt": user("M"), "answer": "18", "grader": "math", "domain": "math", "source_uid": "5"},
        {"prompt": user("F"), "answer": json.dumps(tests[0]), "grader": "code", "domain": "code", "source_uid": "5"},
        {"prompt": user("S"), "answer": json.dumps(tests[1]), "grader": "code", "domain": "code", "source_uid": "6"},
        {"prompt": user("A"), "domain": "code", "source_uid": "7"},
    ]
    assert report_of(tmp_path / "out")["answers_left_out"] == {"tests of another form than inputs and outputs": 1}


# ---- Nemotron ----


def test_nemotron_sft_messages(tmp_path):
    rows = [
        {"uuid": "u1", "license": "l", "generator": "g", "version": "v2", "category": "math", "reasoning": "on",
         "messages": [{"role": "system", "content": ""}, *user("Q"), {"role": "assistant", "content": "<think>t</think> A"}]},
        {"uuid": "u2", "license": "l", "generator": "g", "version": "v2", "category": "chat", "reasoning": "off",
         "messages": [*user("A"), {"role": "assistant", "content": "B"}, *user("C"), {"role": "assistant", "content": "D"}]},
    ]  # fmt: skip
    data = write_rows(tmp_path / "n.parquet", rows)
    assert prepare(data, tmp_path / "out", "--responses") == [
        {"prompt": [{"role": "system", "content": ""}, *user("Q")], "response": "<think>t</think> A", "domain": "math",
         "uid": uid(("system", ""), ("user", "q")), "source_uid": "u1"},
        {"prompt": [*user("A"), {"role": "assistant", "content": "B"}, *user("C")], "response": "D", "domain": "chat",
         "uid": uid(("user", "a"), ("assistant", "b"), ("user", "c")), "source_uid": "u2"},
    ]  # fmt: skip
    (row,) = prepare(data, tmp_path / "on", "--where", "reasoning=on", "--system-messages", "drop")
    assert row == {"prompt": user("Q"), "domain": "math", "uid": uid(("user", "q")), "source_uid": "u1"}
    assert report_of(tmp_path / "on")["left_out"]["where"]["rows"] == 1


def test_nemotron_sft_pairs(tmp_path):
    common = {"category": "math", "reasoning": "on", "used_in_training": "yes", "version": "v1"}
    rows = [
        {"input": user("Q"), "output": "A", "system_prompt": "detailed thinking on", **common},
        {"input": "plain", "output": "B", "system_prompt": "", **common},
        {
            "input": [{"role": "system", "content": "own"}, *user("R")],
            "output": "C",
            "system_prompt": "row's",
            **common,
        },
    ]
    data = write_rows(tmp_path / "n.jsonl", rows)
    system = [{"role": "system", "content": "detailed thinking on"}]
    assert without_uids(prepare(data, tmp_path / "out", "--responses")) == [
        {"prompt": [*system, *user("Q")], "response": "A", "domain": "math"},
        {"prompt": user("plain"), "response": "B", "domain": "math"},
        {"prompt": [{"role": "system", "content": "own"}, *user("R")], "response": "C", "domain": "math"},
    ]
    assert [row["prompt"] for row in prepare(data, tmp_path / "b", "--system-messages", "drop")] == [
        user("Q"), user("plain"), user("R")
    ]  # fmt: skip


def gym(given, **fields):
    return {"responses_create_params": {"input": given, "tools": [], "parallel_tool_calls": False}, **fields}


def test_nemotron_rl(tmp_path):
    ids, kwargs = (
        ["paragraphs:paragraphs", "length_constraints:number_words"],
        [None, {"num_words": 9, "relation": None}],
    )
    parts = [{"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]}, *user("C")]
    rows = [
        gym(user("M"), question="M", expected_answer="\\frac{1}{2}", uuid="m"),
        gym(user("B"), options=[{"A": "x"}, {"B": "y"}], expected_answer="b", uuid="b"),
        gym("I", verifier_metadata={"instruction_id_list": ids, "kwargs": kwargs, "prompt": "I"}, id=3),
        gym("I2", instruction_id_list=ids, kwargs=kwargs, prompt="I2", id=4),
        gym(parts, verifier_metadata={"unit_tests": {"inputs": ["1"], "outputs": ["2"], "fn_name": None}}, id=5),
        gym(user("O"), ground_truth="x", category="other"),
        gym([*user("T"), {"type": "function_call", "name": "f", "arguments": "{}"}], expected_answer="x"),
    ]
    constraints = json.dumps([
        {"instruction_id": ids[0], "kwargs": {}}, {"instruction_id": ids[1], "kwargs": {"num_words": 9}}
    ])  # fmt: skip
    tests = json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])
    assert without_uids(prepare(write_rows(tmp_path / "gym.jsonl", rows), tmp_path / "out")) == [
        {"prompt": user("M"), "answer": "\\frac{1}{2}", "grader": "math", "domain": "math", "source_uid": "m"},
        {"prompt": user("B"), "answer": "B", "grader": "choice", "domain": "science", "source_uid": "b"},
        {"prompt": user("I"), "answer": constraints, "grader": "instructions", "domain": "instructions", "source_uid": "3"},
        {"prompt": user("I2"), "answer": constraints, "grader": "instructions", "domain": "instructions", "source_uid": "4"},
        {"prompt": [{"role": "system", "content": "Be brief."}, *user("C")], "answer": tests, "grader": "code",
         "domain": "code", "source_uid": "5"},
        {"prompt": user("O"), "answer": "x", "domain": "other"},
    ]  # fmt: skip
    assert report_of(tmp_path / "out")["left_out"]["tools"] == {"rows": 1, "examples": [f"{tmp_path}/gym.jsonl:7"]}


# ---- any rows ----


def test_rows_by_the_names_of_their_columns(tmp_path):
    rows = [{"q": {"text": "Q"}, "r": "R", "a": 7, "g": "exact", "d": "logic", "n": 12}]
    flags = ["--format", "rows", "--prompt-key", "q.text", "--response-key", "r", "--answer-key", "a", "--grader-key", "g",
             "--domain-key", "d", "--uid-key", "n", "--responses"]  # fmt: skip
    assert prepare(write_rows(tmp_path / "r.parquet", rows), tmp_path / "out.jsonl", *flags) == [
        {"prompt": "Q", "response": "R", "answer": "7", "grader": "exact", "domain": "logic",
         "uid": uid(("user", "q")), "source_uid": "12"}
    ]  # fmt: skip


def test_what_was_prepared_can_be_prepared_again(tmp_path):
    data = write_rows(tmp_path / "dapo.parquet", [rl_row("Q one", "34"), rl_row("Q two", "5")])
    first = prepare(data, tmp_path / "first")
    again = prepare(tmp_path / "first", tmp_path / "second.parquet")
    assert again == [{**row, "source_uid": row["uid"]} for row in first]


@pytest.mark.parametrize("name", ["out", "out.parquet", "out.jsonl"])
def test_a_run_reads_what_is_written(tmp_path, name):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer", chat=True))
    data = write_rows(tmp_path / "o.jsonl", OPENTHOUGHTS)
    rows = prepare(data, tmp_path / name, "--responses", "--shard-rows", "2", "--write-dropped",
                   "--tokenizer", str(tmp_path / "tokenizer"))  # fmt: skip
    prompts = list(load_prompts(tmp_path / name, tokenizer, CHAT))
    assert [prompt.name for prompt in prompts] == [row["uid"] for row in rows]
    assert [prompt.domain for prompt in prompts] == ["math", "code", "science"]
    assert tokenizer.decode(prompts[0].token_ids) == "<user>What is  1 + 1?<end><assistant>"
    assert tokenizer.decode(prompts[0].teacher_response_ids) == "<think>easy</think> 2<eos>"


def test_texts_are_read_without_a_template(tmp_path):
    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer"))
    data = write_rows(tmp_path / "dapo.parquet", [rl_row("Q one", "34")])
    prepare(data, tmp_path / "out", "--prompt-form", "text", "--tokenizer", str(tmp_path / "tokenizer"))
    (prompt,) = load_prompts(tmp_path / "out", tokenizer, replace(CHAT, chat_template=False))
    assert (tokenizer.decode(prompt.token_ids), prompt.answer) == ("Q one", "34")


# ---- sources ----


def test_sources_of_every_kind(tmp_path, monkeypatch):
    rows = [rl_row(f"Question {number}", str(number)) for number in range(4)]
    datasets.Dataset.from_list(rows[:1]).save_to_disk(tmp_path / "saved")
    write_rows(tmp_path / "directory" / "train.jsonl", rows[1:2])
    write_rows(tmp_path / "directory" / "test.jsonl", rows[2:3])
    write_rows(tmp_path / "hub" / "data" / "train-0.jsonl", rows[3:])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    fill_cache(tmp_path / "home", "owner/set", tmp_path / "hub", repo_type="dataset")
    given = [tmp_path / "saved", f"{tmp_path}/directory::train", "owner/set"]
    written = prepare(given, tmp_path / "out")
    assert [row["answer"] for row in written] == ["0", "1", "3"]
    names = [(source["file"], source.get("commit")) for source in report_of(tmp_path / "out")["sources"]]
    assert names == [(str(given[0]), None), (f"{given[1]}/train.jsonl", None), ("owner/set/data/train-0.jsonl", COMMIT)]
