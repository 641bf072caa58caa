"""Preflight: ids must mean the same pieces; padding rows and stop tokens may differ, and are reported."""

from __future__ import annotations

import json
import time

import pytest

from megatron_tropd.teacher.preflight import PreflightError, check_same_tokens
from tests.rollout_helpers import VOCAB, word_tokenizer

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCAB))]


def side(directory, *, words=WORDS, rows=64, eos=1, config=None, generation=None, template=None, **special):
    """A directory with what preflight reads: tokenizer, config.json, generation_config.json."""
    tokenizer = word_tokenizer(directory, words, **special)
    if template:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
    content = {"model_type": "qwen3", "vocab_size": rows, "eos_token_id": eos} if config is None else config
    (directory / "config.json").write_text(json.dumps(content))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return directory


def test_equal_sides_pass_without_a_warning(tmp_path):
    report = check_same_tokens(side(tmp_path / "s"), side(tmp_path / "t"))
    assert report.num_tokens == VOCAB
    assert report.common_vocab_size == 64
    assert report.stop_ids == (1,)
    assert report.warnings == ()
    assert [(s.name, s.student, s.teacher) for s in report.special_ids] == [
        ("bos", None, None), ("eos", 1, 1), ("pad", 0, 0),
    ]  # fmt: skip


@pytest.mark.fault(number=23)
def test_padding_rows_may_differ(tmp_path):
    report = check_same_tokens(side(tmp_path / "s", rows=128), side(tmp_path / "t", rows=62))
    assert (report.student_vocab_size, report.teacher_vocab_size, report.common_vocab_size) == (128, 62, 62)


@pytest.mark.fault(number=24)
def test_different_pieces_are_refused_with_the_first_five(tmp_path):
    swapped = [*WORDS[:10], *WORDS[17:9:-1], *WORDS[18:]]
    with pytest.raises(PreflightError) as caught:
        check_same_tokens(side(tmp_path / "s"), side(tmp_path / "t", words=swapped))
    message = str(caught.value)
    assert "8 of 60 token ids mean different pieces" in message
    assert "id 10: student 'w10', teacher 'w17'" in message and "id 14: student 'w14', teacher 'w13'" in message
    assert "id 15:" not in message and "and 3 more" in message
    assert f"--hf-checkpoint {tmp_path / 's'}" in message and f"--teacher-hf-checkpoint {tmp_path / 't'}" in message


def test_a_token_only_one_side_has_is_refused(tmp_path):
    with pytest.raises(PreflightError, match=r"id 60: student \(no piece\), teacher 'extra'"):
        check_same_tokens(side(tmp_path / "s"), side(tmp_path / "t", words=[*WORDS, "extra"]))


def test_tokens_without_embedding_rows_are_refused(tmp_path):
    with pytest.raises(PreflightError, match=r"--teacher-hf-checkpoint goes up to id 59 .* vocab_size 59"):
        check_same_tokens(side(tmp_path / "s"), side(tmp_path / "t", rows=59))


def test_stop_tokens_are_united_and_a_difference_is_a_warning(tmp_path):
    report = check_same_tokens(side(tmp_path / "s"), side(tmp_path / "t", generation=[7, 1]))
    assert report.student_stop_ids == (1,)
    assert report.teacher_stop_ids == (7, 1)
    assert report.stop_ids == (1, 7)
    (warning,) = report.warnings
    assert "student 1 '<eos>', teacher 7 'w7', 1 '<eos>'" in warning


def test_a_stop_token_outside_the_common_rows_is_refused(tmp_path):
    with pytest.raises(PreflightError, match=r"\[62\] of --teacher-hf-checkpoint are outside its vocab_size 61"):
        check_same_tokens(side(tmp_path / "s"), side(tmp_path / "t", rows=61, generation=[62]))
    with pytest.raises(PreflightError, match=r"\[62\] are outside the 61 rows that both models have"):
        check_same_tokens(side(tmp_path / "u", generation=[62]), side(tmp_path / "v", rows=61))


def test_other_special_ids_and_templates_are_warnings(tmp_path):
    report = check_same_tokens(
        side(tmp_path / "s", bos_token="w3"), side(tmp_path / "t", pad_token="<eos>", template="{{ messages }}")
    )
    assert [w for w in report.warnings if w.startswith("bos token differs: student 3, teacher None")]
    assert [w for w in report.warnings if w.startswith("pad token differs: student 0, teacher 1")]
    assert [w for w in report.warnings if w.startswith("chat templates differ")]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "needs a config.json"),
        (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "config.json").write_text('{"eos_token_id": 1}'), "vocab_size None"),
        (lambda d: [f.unlink() for f in d.iterdir() if "token" in f.name], "no vocabulary"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), "cannot be read"),
    ],
)
def test_unusable_directories_name_the_flag(tmp_path, spoil, message):
    student, teacher = side(tmp_path / "s"), side(tmp_path / "t")
    spoil(teacher)
    with pytest.raises(PreflightError, match=f"^--teacher-hf-checkpoint .*{message}"):
        check_same_tokens(student, teacher)
    with pytest.raises(PreflightError, match=r"^--hf-checkpoint"):
        check_same_tokens(teacher, student)


def test_large_vocabularies_take_little_time(tmp_path):
    words = ["<pad>", "<eos>", *(f"word{i}" for i in range(2, 150_000))]
    sides = [side(tmp_path / name, words=words, rows=150_016) for name in "st"]
    start = time.process_time()
    assert check_same_tokens(*sides).num_tokens == 150_000
    seconds = time.process_time() - start
    print(f"preflight of 150k tokens: {seconds:.2f} s")
    assert seconds < 4  # 0.8 s was measured
