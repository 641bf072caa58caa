"""Our questions and our grading as benchmarks of evalscope, which asks, repeats, counts and keeps."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from evalscope.api.benchmark import BenchmarkMeta, DefaultDataAdapter
from evalscope.api.dataset import DatasetDict, MemoryDataset, Sample
from evalscope.api.dataset.loader import repeat_samples
from evalscope.api.messages import ChatMessageSystem, ChatMessageUser
from evalscope.api.metric import Score
from evalscope.api.registry import BENCHMARK_REGISTRY

from megatron_tropd.benchmarks.data_files import Questions, Row
from megatron_tropd.benchmarks.protocol import BENCHMARKS, Protocol
from megatron_tropd.benchmarks.runner.grading import (
    CodeGrader,
    Grade,
    answer_text,
    grade_choice,
    grade_instructions,
    grade_math,
)

_LETTERS = "ABCD"
_GPQA_OPTIONS = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What an adapter works on; set before evalscope makes it."""

    name: str
    questions: Questions
    protocol: Protocol
    code: CodeGrader
    graded: Callable[[], None]
    """Called after each graded response."""


def register(work: Work) -> str:
    """Make ``work`` a benchmark of evalscope and return what evalscope calls it."""
    known_as = f"tropd_{work.name}"
    adapter = type("Adapter", (_Adapter,), {"work": work})
    # No decorator: one name is registered anew for every job of this process.
    BENCHMARK_REGISTRY[known_as] = BenchmarkMeta(
        name=known_as, pretty_name=BENCHMARKS[work.name].title, dataset_id=work.name, metric_list=["acc"],
        eval_split="test", data_adapter=adapter, description="",
    )  # fmt: skip
    return known_as


class _Adapter(DefaultDataAdapter):
    """One of our benchmarks."""

    work: Work

    def load(self) -> tuple[DatasetDict, None]:
        """Return every question as often as it is asked; the sample with index i asks question i // samples."""
        prompts = [_sample(self.work, row) for row in self.work.questions.rows]
        dataset = MemoryDataset(samples=repeat_samples(prompts, self.repeats), name=self.work.name)
        dataset.reindex(group_size=self.repeats)
        return DatasetDict({"default": dataset}), None

    def match_score(self, original_prediction: str, filtered_prediction: str, reference: str, task_state: Any) -> Score:
        """Grade one response."""
        work, output = self.work, task_state.output
        row = work.questions.rows[task_state.sample_id // self.repeats]
        finish = {"max_tokens": "length"}.get(output.stop_reason, output.stop_reason)
        metrics = BENCHMARKS[work.name].metrics
        if finish != "stop" and work.protocol.truncated == "wrong":
            grade = Grade(scores=dict.fromkeys(metrics, 0.0))
        else:
            grade = _grade(work, row, task_state.metadata, answer_text(original_prediction))
        work.graded()
        return Score(
            value={"acc": grade.scores[metrics[0]]}, prediction=original_prediction,
            extracted_prediction=grade.answer, main_score_name="acc",
            metadata={
                "scores": grade.scores, "finish": finish, "tokens": output.usage.output_tokens if output.usage else 0,
                "error": grade.error,
            },
        )  # fmt: skip


def _grade(work: Work, row: Row, metadata: dict[str, Any], text: str) -> Grade:
    kind = BENCHMARKS[work.name].kind
    if kind == "math":
        return grade_math(work.name, row, text)
    if kind == "choice":
        return grade_choice(metadata["targets"], text)
    if kind == "instructions":
        return grade_instructions(row, text)
    return work.code.grade(row, text)


def _sample(work: Work, row: Row) -> Sample:
    """Return what is asked about a row."""
    kind = BENCHMARKS[work.name].kind
    if kind == "math":
        return _asked(work.protocol.math_template.replace("{question}", row["question"].strip()))
    if kind == "instructions":
        return _asked(row["prompt"])
    if kind == "code":
        return _code_sample(row)
    question, options, targets = _choices(work, row)
    shown = "\n".join(f"{letter}) {option}" for letter, option in zip(_LETTERS, options, strict=True))
    values = {"letters": ",".join(_LETTERS), "question": question, "choices": shown}
    # In one pass: a question may hold braces, or the name of a placeholder.
    text = re.sub(r"\{(question|choices|letters)\}", lambda found: values[found[1]], work.protocol.choice_template)
    return _asked(text, targets=targets)


def _asked(text: str, **metadata: Any) -> Sample:
    return Sample(input=[ChatMessageUser(content=text)], target="", metadata=metadata)


def _code_sample(row: Row) -> Sample:
    """LiveCodeBench's own prompt, as evalscope has it."""
    from evalscope.benchmarks.live_code_bench.load_utils import transform
    from evalscope.benchmarks.live_code_bench.prompts import CodeGenerationPromptConstants

    # transform() would unpickle the private tests; they are read by code_tests.py.
    published = transform({**row, "private_test_cases": "[]"})
    template = BENCHMARK_REGISTRY["live_code_bench"].prompt_template
    text = template.format(question_content=published["question_content"], format_prompt=published["format_prompt"])
    system = ChatMessageSystem(content=CodeGenerationPromptConstants.SYSTEM_MESSAGE_GENERIC)
    return Sample(input=[system, ChatMessageUser(content=text)], target="")


def _choices(work: Work, row: Row) -> tuple[str, list[str], list[str]]:
    """Return question, options in the order shown, and the letters that are right."""
    if work.name == "mmlu_redux":
        return _mmlu_choices(row)
    question = row["Question"].strip()
    order = list(_GPQA_OPTIONS)
    # By text and seed alone, so that neither other questions nor the number of samples changes an order.
    digest = hashlib.sha256(f"{work.protocol.choice_seed}\0{question}".encode()).digest()
    random.Random(int.from_bytes(digest[:8], "big")).shuffle(order)
    return question, [row[name].strip() for name in order], [_LETTERS[order.index("Correct Answer")]]


def _mmlu_choices(row: Row) -> tuple[str, list[str], list[str]]:
    """Rows that are not ok have another answer, several or an option replaced: evalscope's adapter knows how."""
    if row["error_type"] == "ok":
        return row["question"].strip(), row["choices"], [_LETTERS[int(row["answer"])]]
    from evalscope.benchmarks.mmlu_redux.mmlu_redux_adapter import MMLUReduxAdapter

    sample = MMLUReduxAdapter.record_to_sample(None, {**row, "choices": list(row["choices"])})
    targets = [sample.target] if isinstance(sample.target, str) else list(sample.target)
    return row["question"].strip(), list(sample.choices), targets
