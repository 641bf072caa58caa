"""The small world of the quickstart: its language, its lessons, its checkpoints and its files."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, Qwen3ForCausalLM

from tools.small_world import arithmetic, build, language, pretraining, sampling

pytestmark = pytest.mark.slow

TINY = replace(pretraining.STUDENT, num_lessons=256, max_steps=5, stop_accuracy=float("inf"))


@pytest.fixture
def problems():
    return arithmetic.draw_problems(Random(0), 200)


@pytest.fixture
def lessons(problems):
    rng = Random(1)
    return [arithmetic.write_lesson(rng, problem) for problem in problems]


def words(lesson: arithmetic.Lesson) -> list[str]:
    return [language.WORDS[index] for index in lesson.token_ids]


def test_problem_reads_and_calculates():
    problem = arithmetic.Problem(3, (("+", 5), ("*", 2), ("-", 6), ("+", 1)))
    assert problem.prompt == "3 a + 5 b * 2 c - 6 d + 1 ?"
    assert problem.answer == "3 4"  # 3, 8 = 1, 2, -4 = 3, 4


def test_problems_are_reproducible_different_and_avoid_what_was_seen(problems):
    assert problems == arithmetic.draw_problems(Random(0), 200)
    assert len(set(problems)) == 200
    others = arithmetic.draw_problems(Random(0), 200, set(problems))
    assert not set(others) & set(problems)


def test_sets_of_a_world_are_disjoint(tmp_path):
    sets = build.split_problems(build.WorldSpec(save=tmp_path, num_train_prompts=100, num_eval_prompts=50))
    assert [len(sets.held_out), len(sets.train), len(sets.stopping)] == [50, 100, 192]
    assert len({*sets.held_out, *sets.train, *sets.stopping}) == 342


def test_every_taught_result_follows_from_what_was_written(problems, lessons):
    """Whatever happened before, the taught tokens calculate rightly from the written values."""
    wrong_results = 0
    for problem, lesson in zip(problems, lessons, strict=True):
        text = " ".join(words(lesson))
        value = previous = problem.start
        chunks = re.findall(r"([a-d]) (?:(\d) ([-+*]) (\d) = )?(\d) (?:,|;|so|then)", text)
        assert len(chunks) == arithmetic.NUM_STEPS
        for (sign, operand), (_, left, written_sign, right, result) in zip(problem.steps, chunks, strict=True):
            if left:
                assert (int(left), written_sign, int(right)) == (value, sign, operand)
            wrong_results += int(result) != arithmetic.apply(value, sign, operand)
            previous, value = value, int(result)
        assert text.endswith(f"# {previous} {value} <eos>")
    untaught = sum(not taught for lesson in lessons for taught in lesson.taught)
    assert untaught == wrong_results > 0


def test_lesson_without_a_mistake_has_the_right_answer(problems, lessons):
    clean = [(p, lesson) for p, lesson in zip(problems, lessons, strict=True) if all(lesson.taught)]
    assert len(clean) > 100
    assert all(sampling.is_right(lesson.token_ids, problem.answer) for problem, lesson in clean)
    assert max(len(lesson.token_ids) for lesson in lessons) <= arithmetic.MAX_RESPONSE_LEN


def test_only_a_finished_exact_answer_is_right():
    right = language.encode("a 3 , # 2 3 <eos>")
    assert sampling.is_right(right, "2 3")
    assert not sampling.is_right(right[:-1], "2 3")
    assert not sampling.is_right(right, "3 2")
    assert not sampling.is_right(language.encode("# 2 3 , <eos>"), "2 3")
    assert not sampling.is_right(language.encode("2 3 <eos>"), "2 3")


def test_tokenizer_on_disk_is_the_word_list(tmp_path, problems, lessons):
    build.save_checkpoint(pretraining.make_model(16, seed=0), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(language.WORDS)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (language.PAD_ID, language.EOS_ID)
    for problem, lesson in zip(problems, lessons, strict=True):
        response = list(lesson.token_ids)
        text = tokenizer.decode(response, skip_special_tokens=True)
        assert text == language.decode(response)
        assert tokenizer(text).input_ids == language.encode(text) == response[:-1]
        assert tokenizer(problem.prompt).input_ids == language.encode(problem.prompt)
        assert len(language.encode(problem.prompt)) == arithmetic.PROMPT_LEN
    assert tokenizer("nonsense").input_ids == [language.UNK_ID]


def test_book_padding_and_masks_do_not_change_the_loss(problems, lessons):
    """The loss of a batch is the mean over its taught tokens, each lesson alone in an unpadded batch."""
    model = pretraining.make_model(16, seed=0)
    book = pretraining.make_book(problems[:8], lessons[:8])
    together = pretraining.lesson_loss(model, book.token_NL, book.taught_NR)
    total = torch.zeros(())
    for row in range(8):
        alone = pretraining.make_book(problems[row : row + 1], lessons[row : row + 1])
        total = total + pretraining.lesson_loss(model, alone.token_NL, alone.taught_NR) * sum(lessons[row].taught)
    torch.testing.assert_close(together, total / book.taught_NR.sum())


def test_few_steps_lower_the_loss(problems, lessons):
    model = pretraining.make_model(48, seed=0)
    book = pretraining.make_book(problems, lessons)
    before = pretraining.lesson_loss(model, book.token_NL, book.taught_NR).item()
    pretraining.train(model, book, replace(TINY, warmup_steps=1), 0, measure=lambda: 0.0)
    after = pretraining.lesson_loss(model, book.token_NL, book.taught_NR).item()
    assert after < before - 0.1


def test_training_stops_at_the_wanted_accuracy(problems, lessons):
    recipe = replace(TINY, max_steps=9, stop_accuracy=0.5, stop_from_step=4, stop_every=2)
    measured = iter([0.1, 0.6])
    lines: list[str] = []
    book = pretraining.make_book(problems, lessons)
    model = pretraining.make_model(16, seed=0)
    training = pretraining.train(model, book, recipe, 0, measure=lambda: next(measured), report=lines.append)
    assert training.steps == 6
    assert len(lines) == 1 and "60.0%" in lines[0]


def test_cached_greedy_writing_is_the_argmax_of_a_plain_forward(problems):
    model = pretraining.make_model(16, seed=3)
    prompts = sampling.prompt_batch(problems[:4])
    for prompt, response in zip(prompts, sampling.write_responses(model, prompts, sampling.GREEDY), strict=True):
        whole = torch.cat([prompt, torch.tensor(response)])
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0, len(prompt) - 1 : -1]
        logits[:, [language.PAD_ID, language.UNK_ID]] = -torch.inf
        assert logits.argmax(-1).tolist() == response


def test_world_on_disk(tmp_path):
    teacher = replace(TINY, name="teacher")
    spec = build.WorldSpec(
        save=tmp_path / "world", num_train_prompts=6, num_eval_prompts=4, teacher=teacher, student=TINY
    )
    world = build.make_world(spec)
    assert json.loads((spec.save / "world.json").read_text()) == world
    assert set(world["student"]["accuracy"]) == {"greedy", "top_p_0.7", "temperature_1"}
    rows = read_jsonl(spec.save / "train.jsonl")
    assert len(rows) == 6 and len(read_jsonl(spec.save / "eval.jsonl")) == 4
    assert all(set(row) == {"prompt", "response", "answer"} for row in rows)
    for name in ("teacher", "student"):
        config = AutoConfig.from_pretrained(spec.save / name)
        assert (config.model_type, config.vocab_size) == ("qwen3", len(language.WORDS))
        assert config.num_key_value_heads % 2 == 0  # tensor parallel 2
        assert GenerationConfig.from_pretrained(spec.save / name).eos_token_id == language.EOS_ID
        weights = Qwen3ForCausalLM.from_pretrained(spec.save / name).state_dict()
        assert all(weight.dtype == torch.float32 and weight.isfinite().all() for weight in weights.values())


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
