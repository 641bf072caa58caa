"""Make a small world on disk: two checkpoints, training prompts with the teacher's responses, held-out prompts."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, Qwen3ForCausalLM

from .arithmetic import (
    MAX_RESPONSE_LEN,
    USUAL,
    Lesson,
    Problem,
    Style,
    add_fillers,
    draw_problems,
    write_lesson,
)
from .language import ANSWER_PATTERN, EOS_ID, PAD_ID, decode, make_tokenizer
from .pretraining import STUDENT, TEACHER, Recipe, Training, make_book, make_model, train
from .sampling import DECODINGS, TEMPERATURE_1, TOP_P, accuracy, prompt_batch, write_responses


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSpec:
    """The world to make, and where."""

    save: Path
    seed: int = 0
    num_train_prompts: int = 1600
    num_eval_prompts: int = 512
    teacher: Recipe = TEACHER
    student: Recipe = STUDENT


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSets:
    """Problems that no network is pretrained on; the three sets share no problem."""

    held_out: list[Problem]
    train: list[Problem]
    stopping: list[Problem]


def split_problems(spec: WorldSpec, num_stopping: int = 192) -> ProblemSets:
    """Draw the three sets together, so that they share no problem."""
    sizes = spec.num_eval_prompts, spec.num_train_prompts
    drawn = draw_problems(Random(f"{spec.seed} prompts"), sum(sizes) + num_stopping)
    return ProblemSets(held_out=drawn[: sizes[0]], train=drawn[sizes[0] : sum(sizes)], stopping=drawn[sum(sizes) :])


def make_world(spec: WorldSpec) -> dict[str, Any]:
    """Write everything and return the content of ``world.json``.

    Teacher and student do not depend on each other: each is made by a process with one thread, because networks
    this small gain nothing from a second thread.
    """
    started = time.perf_counter()
    spec.save.mkdir(parents=True, exist_ok=True)
    (spec.save / "world.json").unlink(missing_ok=True)  # written last: where it is, the world is complete
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=_prepare_worker) as workers:
        student = workers.submit(make_network, spec, spec.student)
        teacher = workers.submit(make_teacher_side, spec)
        world = _description(spec) | {"teacher": teacher.result(), "student": student.result()}
    world["seconds"] = round(time.perf_counter() - started, 1)
    (spec.save / "world.json").write_text(json.dumps(world, indent=2) + "\n")
    return world


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


def make_teacher_side(spec: WorldSpec) -> dict[str, Any]:
    """Make the teacher, and the prompt files, which hold the responses of the teacher."""
    facts = make_network(spec, spec.teacher)
    model = Qwen3ForCausalLM.from_pretrained(spec.save / spec.teacher.name)
    problems = split_problems(spec)
    rows = write_train_rows(model, problems.train, spec.seed)
    _write_jsonl(spec.save / "train.jsonl", rows)
    _write_jsonl(spec.save / "eval.jsonl", [{"prompt": p.prompt, "answer": p.answer} for p in problems.held_out])
    print(f"{spec.teacher.name}  wrote {len(rows)} responses", flush=True)
    return facts


def make_network(spec: WorldSpec, recipe: Recipe) -> dict[str, Any]:
    """Train one network, save it as a checkpoint and say how good it is on the held-out problems."""
    problems = split_problems(spec)
    rng = Random(f"{spec.seed} {recipe.name} lessons")
    lesson_problems = draw_problems(rng, recipe.num_lessons, {*problems.held_out, *problems.train, *problems.stopping})
    book = make_book(lesson_problems, write_lessons(rng, lesson_problems, recipe.style))
    model = make_model(recipe.hidden_size, seed=Random(f"{spec.seed} {recipe.name} weights").getrandbits(32))
    once = replace(TOP_P, num_samples=1)
    training = train(
        model,
        book,
        recipe,
        spec.seed,
        measure=lambda: accuracy(model, problems.stopping, once, spec.seed),
        report=lambda line: print(line, flush=True),
    )
    save_checkpoint(model, spec.save / recipe.name)
    reached = {decoding.name: accuracy(model, problems.held_out, decoding, spec.seed) for decoding in DECODINGS}
    return _describe_network(model, recipe, training, reached)


def write_lessons(rng: Random, problems: Sequence[Problem], style: Style) -> list[Lesson]:
    """One lesson per problem.

    Fillers are drawn after all lessons: two styles that differ in fillers alone give lessons that differ in fillers
    alone.
    """
    lessons = [write_lesson(rng, problem, style) for problem in problems]
    return [add_fillers(rng, lesson, style) for lesson in lessons] if style.p_filler else lessons


def save_checkpoint(model: Qwen3ForCausalLM, directory: Path) -> None:
    """Save a directory that every Hugging Face tool can open."""
    model.generation_config = GenerationConfig(
        eos_token_id=EOS_ID, pad_token_id=PAD_ID, do_sample=True, max_new_tokens=MAX_RESPONSE_LEN
    )
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    _name_tokenizer_class(directory / "tokenizer_config.json")


def _name_tokenizer_class(path: Path) -> None:
    """Write a class name that Transformers 4.57 and 5 both know; 5 writes one that 4.57 does not know."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2))


def write_train_rows(
    teacher: Qwen3ForCausalLM, problems: Sequence[Problem], seed: int, batch_size: int = 400
) -> list[dict[str, str | None]]:
    """One row per problem with a response that the teacher sampled at temperature 1, as text without its EOS."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer()
    rows = []
    for first in range(0, len(problems), batch_size):
        batch = problems[first : first + batch_size]
        responses = write_responses(teacher, prompt_batch(batch), TEMPERATURE_1, generator)
        for problem, response in zip(batch, responses, strict=True):
            finished = response[-1] == EOS_ID
            text = decode(response)
            if tokenizer(text).input_ids != response[: len(response) - finished]:
                raise AssertionError(f"text and tokens of a teacher response differ: {text!r} and {response}")
            # A response that was cut off has no end to imitate; its prompt is trained without a prefix.
            rows.append({"prompt": problem.prompt, "response": text if finished else None, "answer": problem.answer})
    return rows


def _write_jsonl(path: Path, rows: Sequence[dict[str, str | None]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _description(spec: WorldSpec) -> dict[str, Any]:
    return {
        "seed": spec.seed,
        "num_train_prompts": spec.num_train_prompts,
        "num_eval_prompts": spec.num_eval_prompts,
        "max_response_len": MAX_RESPONSE_LEN,
        "answer_pattern": ANSWER_PATTERN,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _describe_network(
    model: Qwen3ForCausalLM, recipe: Recipe, training: Training, reached: dict[str, float]
) -> dict[str, Any]:
    return {
        "num_parameters": sum(weight.numel() for weight in model.parameters()),
        "recipe": _describe_recipe(recipe),
        "steps": training.steps,
        "loss": round(training.loss, 4),
        "accuracy": {name: round(value, 4) for name, value in reached.items()},
        "cpu_seconds": round(training.cpu_seconds, 1),
        "wall_seconds": round(training.wall_seconds, 1),
    }


def _describe_recipe(recipe: Recipe) -> dict[str, Any]:
    """Its settings, without those that mean "as usual"."""
    described = {name: value for name, value in asdict(recipe).items() if value != math.inf}
    if recipe.style == USUAL:
        del described["style"]
    return described
