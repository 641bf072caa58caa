"""The steps of tools/prepare_prompts.py: each does what it says, and is counted."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.prompt_files import prepare, questions_of, read_rows, report_of, rl_row, user, write_rows
from tests.test_data_tokenizer import save_tokenizer
from tools.prepare_prompts import main
from tools.prompt_preparation.benchmarks import Benchmarks, Question
from tools.prompt_preparation.texts import words_of


def counts(save):
    return {reason: found["rows"] for reason, found in report_of(save)["left_out"].items()}


# ---- wrappers ----


def test_wrappers_are_taken_off_and_a_suffix_is_added(tmp_path):
    rows = [
        rl_row("Solve it.\n\nWhat is 2?\n\nRemember.", "2"),
        rl_row("solve it. Untouched", "3"),
        rl_row("Solve it.", "4"),
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    flags = ["--strip-prefix", "Other", "Solve it.", "--strip-suffix", "Remember.", "--prompt-suffix", "Box it."]
    written = prepare(data, tmp_path / "out", *flags)
    assert questions_of(written) == ["What is 2?\nBox it.", "solve it. Untouched\nBox it.", "Solve it.\nBox it."]
    report = report_of(tmp_path / "out")
    assert report["stripped"] == {"Other": 0, "Solve it.": 1, "Remember.": 1}
    assert report["notes"] == ["--strip-prefix 'Other': no prompt has it"]
    bare = prepare(write_rows(tmp_path / "bare.jsonl", [rl_row("What is 2?", "2")]), tmp_path / "bare")
    assert bare[0]["uid"] == written[0]["uid"]  # the suffix is no part of the question


# ---- repeats ----


def slow_oracle(rows, conflicting):
    """What is left of (question, answer) rows, by comparing each with all others."""

    def same(one, other):
        return normal(one[0]) == normal(other[0])

    kept = []
    for number, row in enumerate(rows):
        first = not any(same(row, other) for other in rows[:number])
        answers = {normal(other[1]) for other in rows if same(row, other)}
        if first and (len(answers) == 1 or conflicting == "keep-first"):
            kept.append(row)
    return kept


def normal(text):
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())).strip()


PIECES = st.sampled_from(
    ["a", "A", " ", "\n", "\u00e9", "e\u0301", "\uff11", "1", "\u00df", "ss", "\ufb01", "fi", "\u0130"]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=3).map("".join).map(lambda text: f"q {text}")


@settings(max_examples=25)
@given(rows=st.lists(st.tuples(TEXTS, st.sampled_from(["7", " 7", "8"])), min_size=1, max_size=12), drop=st.booleans())
def test_repeats_against_comparing_all_pairs(tmp_path_factory, rows, drop):
    directory = tmp_path_factory.mktemp("repeats")
    data = write_rows(directory / "d.jsonl", [rl_row(*row) for row in rows])
    conflicting = "drop" if drop else "keep-first"
    expected = slow_oracle(rows, conflicting)
    code = main(["--prompt-data", str(data), "--save", str(directory / "out"), "--conflicting-answers", conflicting])
    assert code == (0 if expected else 1)
    written = read_rows(directory / "out") if expected else []
    assert questions_of(written) == [text for text, _ in expected]
    assert [row["answer"] for row in written] == [answer for _, answer in expected]


def test_dapo_has_each_prompt_a_hundred_times(tmp_path):
    rows = [rl_row(f"Question {number % 7}", str(number % 7), f"id{number % 7}") for number in range(700)]
    written = prepare(write_rows(tmp_path / "d.parquet", rows), tmp_path / "out")
    assert questions_of(written) == [f"Question {number}" for number in range(7)]
    assert counts(tmp_path / "out") == {"duplicate": 693}
    kept = prepare(tmp_path / "d.parquet", tmp_path / "kept", "--duplicates", "keep")
    assert len(kept) == len({row["uid"] for row in kept}) == 700


def test_a_copy_with_a_shorter_response_is_kept_and_a_dropped_row_still_conflicts(tmp_path):
    rows = [
        {"prompt": "one", "response": "far too long", "answer": "1"},
        {"prompt": "one", "response": "short", "answer": "1"},
        {"prompt": "two", "response": "far too long", "answer": "1"},
        {"prompt": "two", "response": "short", "answer": "2"},
        {"prompt": "three", "response": "far too long"},
        {"prompt": "four", "response": "short"},
        {"prompt": "four", "response": "shorter", "answer": "9"},
        {"prompt": "five", "response": "short", "answer": "9"},
        {"prompt": "five", "response": "short"},
    ]
    flags = ["--responses", "--max-response-length", "6"]
    written = prepare(write_rows(tmp_path / "d.jsonl", rows), tmp_path / "out", *flags)
    assert [(row["prompt"], row["response"]) for row in written] == [
        ("one", "short"), ("four", "short"), ("five", "short"),
    ]  # fmt: skip
    assert counts(tmp_path / "out") == {"long_response": 3, "conflict": 1, "duplicate": 2}
    kept = prepare(tmp_path / "d.jsonl", tmp_path / "kept", *flags, "--on-long-response", "keep")
    assert [row["prompt"] for row in kept] == ["one", "three", "four", "five"]


# ---- answers, domains ----


def test_answers_domains_and_values(tmp_path):
    rows = [
        {"prompt": "a", "answer": "1", "domain": "math_dapo", "level": {"n": 3}, "hard": True},
        {"prompt": "b", "answer": " ", "domain": "math_dapo", "level": {"n": 3}, "hard": True},
        {"prompt": "c", "answer": None, "domain": "code", "level": {"n": 3}, "hard": True},
        {"prompt": "d", "answer": "1", "domain": "chat", "level": {"n": 3}, "hard": True},
        {"prompt": "e", "answer": "1", "domain": "math_dapo", "level": {"n": 4}, "hard": True},
        {"prompt": "f", "answer": "1", "domain": "math_dapo", "level": {"n": 3}, "hard": False},
        {"prompt": "g", "answer": "1", "domain": "math_dapo", "level": {"n": 3}, "hard": None},
    ]
    data = write_rows(tmp_path / "d.parquet", rows)
    flags = [
        "--domain-map",
        "math_dapo=math",
        "absent=x",
        "--domains",
        "math",
        "code",
        "--where",
        "level.n=3",
        "hard=true",
    ]
    (row,) = prepare(data, tmp_path / "out", *flags, "--require-answer", "--grader", "math")
    assert (row["prompt"], row["domain"], row["grader"]) == ("a", "math", "math")
    assert counts(tmp_path / "out") == {"where": 3, "domain": 1, "no_answer": 2}
    assert report_of(tmp_path / "out")["notes"] == ["--domain-map absent=...: no row is of this domain"]
    assert {row["domain"] for row in prepare(data, tmp_path / "one", "--domain", "all")} == {"all"}


# ---- lengths ----


def test_lengths_in_characters_and_in_tokens(tmp_path):
    tokenizer = str(save_tokenizer(tmp_path / "tokenizer", chat=True))
    rows = [
        {"prompt": user("\u00e9" * 5), "response": "\u00e9" * 4},
        {"prompt": user("a" * 5), "response": "aaaa<eos>"},
        {"prompt": user("b" * 6), "response": "aaaa"},
        {"prompt": user("c" * 5), "response": "aaaaa"},
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    limits = ["--responses", "--max-response-length", "4"]
    by_characters = prepare(data, tmp_path / "characters", *limits, "--max-prompt-length", "5")
    assert questions_of(by_characters) == ["\u00e9" * 5]
    # In tokens a prompt has <user>, <end> and <assistant> around its bytes, and a stop token does not count.
    by_tokens = prepare(data, tmp_path / "tokens", *limits, "--max-prompt-length", "8", "--tokenizer", tokenizer)
    assert questions_of(by_tokens) == ["a" * 5]
    assert counts(tmp_path / "tokens") == {"long_prompt": 2, "long_response": 1}
    lengths = {"unit": "tokens", "prompt": {"mean": 8.0, "max": 8}, "response": {"mean": 4.0, "max": 4}}
    assert report_of(tmp_path / "tokens")["lengths"] == lengths


# ---- decontamination ----


def slow_collision(prompt, questions, ngram, short):
    """Whether a prompt collides with one of the questions, by comparing every pair of word sequences."""
    words = words_of(prompt)
    for question in questions:
        other = words_of(question)
        size = min(ngram, len(other))
        if len(other) < ngram and short == "equal":
            if words == other:
                return True
            continue
        ours = [words[start : start + size] for start in range(len(words) - size + 1)]
        if any(other[start : start + size] in ours for start in range(len(other) - size + 1)):
            return True
    return False


SENTENCES = st.lists(st.sampled_from("abcx"), min_size=1, max_size=9).map(" ".join)


@settings(max_examples=200)
@given(
    prompt=SENTENCES, questions=st.lists(SENTENCES, min_size=1, max_size=4), ngram=st.integers(1, 5),
    short=st.sampled_from(["contained", "equal"]),
)  # fmt: skip
def test_collisions_against_comparing_all_sequences(prompt, questions, ngram, short):
    found = Benchmarks([Question(place=text, text=text) for text in questions], ngram, short).collision(user(prompt))
    assert (found is not None) == slow_collision(prompt, questions, ngram, short)
    if found is not None:
        assert f" {found.words} " in f" {prompt} " and f" {found.words} " in f" {questions[found.number]} "


def test_words():
    assert words_of("Let $x_1 = \uff11\uff12$; is x_1 PRIME?") == ["let", "x_1", "12", "is", "x_1", "prime"]
    assert words_of("\u6c42 x+y \u7684\u503c") == ["\u6c42", "x", "y", "\u7684", "\u503c"]


def test_decontamination(tmp_path):
    question = "Find the number of ordered pairs of integers that have a sum of at most one hundred"
    write_rows(tmp_path / "aime.jsonl", [{"Problem": "other"}, {"Problem": question}])
    write_rows(tmp_path / "amc.parquet", [{"q": {"text": "What is the smallest prime"}}])
    inner = " ".join(question.upper().split()[2:15])
    rows = [
        rl_row(f"Please: {inner} and so on", "1"),
        rl_row(inner.rsplit(" ", 1)[0], "2"),
        rl_row("another word", "3"),
    ]
    rows += [rl_row("What is the smallest   PRIME?", "4"), rl_row("Say what is the smallest prime number", "5")]
    data = write_rows(tmp_path / "d.jsonl", rows)
    flags = ["--write-dropped", "--decontaminate", str(tmp_path / "aime.jsonl")]
    written = prepare(data, tmp_path / "out", *flags)
    assert [row["answer"] for row in written] == ["2", "3", "4", "5"]  # "another" is another word
    report = report_of(tmp_path / "out")["contamination"]
    assert report["questions"] == 2 and report["files"][0]["file"] == str(tmp_path / "aime.jsonl")
    (hit,) = report["collided"]
    assert (hit["question"], hit["text"], hit["rows"]) == (f"{tmp_path}/aime.jsonl:2", question, 1)
    amc = ["--decontaminate", str(tmp_path / "amc.parquet"), "--question-key", "q.text"]
    assert [row["answer"] for row in prepare(data, tmp_path / "contained", *amc)] == ["1", "2", "3"]
    equal = prepare(data, tmp_path / "equal", *amc, "--short-question", "equal")
    assert [row["answer"] for row in equal] == ["1", "2", "3", "5"]
    five = prepare(data, tmp_path / "five", "--decontaminate", str(tmp_path / "aime.jsonl"), "--ngram", "5")
    assert [row["answer"] for row in five] == ["3", "4", "5"]


# ---- choice ----


@pytest.fixture(scope="module")
def mixed():
    rows = [rl_row(f"Question {number}", str(number), ability="math" if number % 3 else "code") for number in range(90)]
    return [*rows, *rows[::7]]


def test_take_depends_on_the_seed_and_not_on_the_order(tmp_path, mixed):
    def taken(rows, name, *flags):
        data = [write_rows(tmp_path / f"{name}{part}.jsonl", rows[part::2]) for part in range(2)]
        return {row["uid"] for row in prepare(data, tmp_path / name, "--take", "math=20", "code=8", *flags)}

    shuffled = random.Random(1).sample(mixed, len(mixed))
    first = taken(mixed, "a")
    assert len(first) == 28 and first == taken(shuffled, "b")
    assert first != taken(mixed, "c", "--seed", "1")
    report = report_of(tmp_path / "a")
    assert report["take"] == {
        "math": {"asked": 20, "available": 60, "taken": 20}, "code": {"asked": 8, "available": 30, "taken": 8},
    }  # fmt: skip
    limited = taken(shuffled, "d", "--max-rows", "11")
    assert len(limited) == 11 and limited < first == taken(mixed, "e", "--max-rows", "28")
    assert counts(tmp_path / "d") == {"duplicate": 13, "not_taken": 62, "over_max_rows": 17}


def test_take_does_not_count_rows_that_conflict(tmp_path):
    rows = [rl_row(f"Question {number}", str(number)) for number in range(90)]
    rows += [rl_row(f"Question {number}", "other") for number in range(0, 90, 2)]
    written = prepare(write_rows(tmp_path / "d.jsonl", rows), tmp_path / "out", "--take", "math=45")
    assert {row["answer"] for row in written} == {str(number) for number in range(1, 90, 2)}


def test_take_leaves_out_other_domains_and_says_what_is_missing(tmp_path, mixed):
    written = prepare(write_rows(tmp_path / "d.jsonl", mixed), tmp_path / "out", "--take", "code=500")
    assert {row["domain"] for row in written} == {"code"} and len(written) == 30
    assert report_of(tmp_path / "out")["notes"] == ["--take code=500: only 30 rows are of this domain"]


# ---- the output ----


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_same_input_gives_the_same_bytes_and_every_row_is_accounted_for(tmp_path, mixed):
    data = write_rows(tmp_path / "d.jsonl", [*mixed, b"{broken", rl_row("Question 3", "4", ability="math")])
    write_rows(tmp_path / "b.jsonl", [{"question": "Question 5"}])
    flags = ["--on-bad-row", "skip", "--decontaminate", str(tmp_path / "b.jsonl"), "--take", "math=30", "code=20",
             "--shard-rows", "16", "--write-dropped"]  # fmt: skip
    written = prepare(data, tmp_path / "one", *flags)
    prepare(data, tmp_path / "two", *flags)
    files = files_of(tmp_path / "one")
    assert files == files_of(tmp_path / "two")
    shards = [f"data/train-{number:05d}-of-00004.parquet" for number in range(4)]
    assert set(files) == {"README.md", "report.json", "dropped.jsonl", *shards}
    report = report_of(tmp_path / "one")
    assert report["rows"] == {"read": len(mixed) + 2, "written": len(written)}
    assert sum(found["rows"] for found in report["left_out"].values()) == len(mixed) + 2 - len(written)
    lines = [json.loads(line) for line in files["dropped.jsonl"].decode().splitlines()]
    for reason, found in report["left_out"].items():
        named = [line for line in lines if line["reason"] == reason]
        assert len(named) == found["rows"]
        assert set(found["examples"]) <= {line["uid"] or line["row"] for line in named}
    assert {line["row"] for line in lines if line["reason"] == "bad_row"} == {f"{data}:{len(mixed) + 1}"}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_file_has_its_report_beside_it(tmp_path, mixed, suffix):
    data = write_rows(tmp_path / "d.jsonl", mixed)
    prepare(data, tmp_path / "o" / f"rows.{suffix}", "--write-dropped")
    names = {f"rows.{suffix}", "rows.report.json", "rows.dropped.jsonl"}
    assert {path.name for path in (tmp_path / "o").iterdir()} == names
    assert len((tmp_path / "o" / "rows.dropped.jsonl").read_text().splitlines()) == 13
