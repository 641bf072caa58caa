"""What a benchmark run leaves in its directory, and how it is read again.

OUTPUT/config.json          the model, and for each benchmark the settings and data that its scores belong to
OUTPUT/scores/NAME.jsonl    one line a question, written when the benchmark is complete
OUTPUT/summary.json         means and standard errors
OUTPUT/table.txt, .md       the table
OUTPUT/evalscope/NAME/      evalscope's own files: prompts and responses, and what an unfinished run has so far
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.atomic_files import write_text
from megatron_tropd.benchmarks.protocol import BENCHMARKS
from megatron_tropd.benchmarks.statistics import Estimate, estimate
from megatron_tropd.json_files import as_dataclass, parse_json_object, read_json_object

CONFIG, SUMMARY, SCORES = "config.json", "summary.json", "scores"
_CHANGED_BY = {
    "weights": "the files of --hf-checkpoint, --load or --run-dir are not the same",
    "data_sha256": "the questions in --data-dir are not the same",
    "num_questions": "their number is not the same",
    "code_timeout_s": "--code-timeout",
    "code_memory_mib": "--code-memory",
}
"""Key of config.json -> what changes it, where that is no flag of the same name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionScores:
    """One question of a benchmark and what its samples got."""

    benchmark: str
    question: str
    scores: dict[str, list[float]]
    """Metric -> score of each sample."""
    finish: list[str]
    """Why each sample ended: ``stop``, ``length`` or what else the server said."""
    tokens: list[int]
    """Length of each response, as the server counted it."""
    grading_errors: int = 0
    """Samples whose grading failed or took too long; they count as wrong."""

    def __post_init__(self) -> None:
        count = len(self.finish)
        lengths = {len(self.tokens), *map(len, self.scores.values())}
        if not count or lengths != {count}:
            raise ValueError(f"{self.benchmark}, question {self.question}: lists of samples differ in length")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One benchmark of a run."""

    benchmark: str
    questions: tuple[QuestionScores, ...]

    def samples(self, metric: str | None = None) -> list[list[float]]:
        """Scores of each question's samples on ``metric``, by default the benchmark's own."""
        return [question.scores[metric or main_metric(self.benchmark)] for question in self.questions]

    def summary(self) -> dict[str, Any]:
        """Return means and standard errors of all metrics, and how the responses ended, ready for JSON."""
        finish = [reason for question in self.questions for reason in question.finish]
        tokens = [length for question in self.questions for length in question.tokens]
        return {
            "num_questions": len(self.questions),
            "num_responses": len(finish),
            "metrics": {name: asdict(self.estimate(name)) for name in BENCHMARKS[self.benchmark].metrics},
            "truncated": finish.count("length") / len(finish),
            "mean_tokens": sum(tokens) / len(tokens),
            "grading_errors": sum(question.grading_errors for question in self.questions),
        }

    def estimate(self, metric: str | None = None) -> Estimate:
        """Mean and standard error over questions."""
        return estimate(self.samples(metric))


def main_metric(name: str) -> str:
    """The metric that is a benchmark's score."""
    return BENCHMARKS[name].metrics[0]


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_scores(output: Path, result: Result) -> None:
    """Write the scores of a complete benchmark."""
    lines = [json.dumps(asdict(question)) for question in result.questions]
    (output / SCORES).mkdir(exist_ok=True)
    write_text(output / SCORES / f"{result.benchmark}.jsonl", "\n".join(lines) + "\n")


def read_scores(output: Path, name: str) -> Result | None:
    """Return the scores of benchmark ``name``; None where it is not complete.  A file without questions, as a crash of
    the machine can leave, counts as none.

    Raises:
        ValueError: the file is not what :func:`write_scores` writes.
    """
    path = output / SCORES / f"{name}.jsonl"
    if not path.is_file():
        return None
    try:
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        rows = [(f"line {number}", parse_json_object(line, f"line {number}")) for number, line in lines]
        questions = tuple(as_dataclass(QuestionScores, row, where) for where, row in rows)
    except ValueError as error:
        raise ValueError(f"{path} is not a file of scores: {error}") from error
    return Result(benchmark=name, questions=questions) if questions else None


def read_results(output: Path) -> dict[str, Result]:
    """Return all complete benchmarks of a run, in the order of the tables.

    Raises:
        ValueError: ``output`` has none.
    """
    found = {name: result for name in BENCHMARKS if (result := read_scores(output, name)) is not None}
    if not found:
        raise ValueError(f"{output} has no complete benchmark (no {SCORES}/*.jsonl); expected an --output directory")
    return found


def model_name(output: Path) -> str:
    """Return how the run in ``output`` calls its model; the directory's name where it does not say."""
    path = output / CONFIG
    name = read_json_object(path).get("model_name") if path.is_file() else None
    return name if isinstance(name, str) else output.name


def keep_config(
    output: Path, *, name: str, model: Mapping[str, Any], benchmarks: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write or extend ``config.json``; what is there already must be the same, so that one directory has one meaning.

    Raises:
        ValueError: the directory holds scores of another model, or of other settings.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / CONFIG
    config: dict[str, Any] = {"model_name": name, "model": dict(model), "benchmarks": {}}
    if path.is_file():
        kept = read_json_object(path)
        if kept.get("model") != config["model"]:
            raise ValueError(_other(output, "model", kept.get("model"), config["model"]))
        config = kept
    for benchmark, settings in benchmarks.items():
        kept_settings = config["benchmarks"].setdefault(benchmark, dict(settings))
        if kept_settings != settings:
            raise ValueError(_other(output, f"benchmark {benchmark}", kept_settings, settings))
    write_json(path, config)


def _other(output: Path, what: str, kept: Any, given: Mapping[str, Any]) -> str:
    there, now = _by_flag(kept if isinstance(kept, Mapping) else {}), _by_flag(given)
    differing = [
        f"{flag}: {_shown(there.get(flag))} there, {_shown(now.get(flag))} here" if flag.startswith("--") else flag
        for flag in {**now, **there}
        if there.get(flag) != now.get(flag)
    ]
    return f"--output {output} was made with another {what}; give another directory.  {'; '.join(differing)}"


def _by_flag(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by what changes them: a flag, or in words where it is the content of files."""
    flat = {**settings, **settings.get("sampling", {})}
    flat.pop("sampling", None)
    return {
        key if key.startswith("--") else _CHANGED_BY.get(key, f"--{key.replace('_', '-')}"): value
        for key, value in flat.items()
    }


def _shown(value: Any) -> str:
    return "not given" if value is None else " ".join(value) if isinstance(value, list) else repr(value)


def write_summary(output: Path, results: Sequence[Result]) -> None:
    """Write ``summary.json``."""
    write_json(output / SUMMARY, {result.benchmark: result.summary() for result in results})
