"""Run the benchmarks of a job by evalscope, one after another, and return what every response got."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.benchmarks.data_files import NLTK_FOLDER, Questions, read_questions
from megatron_tropd.benchmarks.protocol import BENCHMARKS, Protocol
from megatron_tropd.sandbox import Limits

_PROGRESS_S = 1.0
"""Least time between two reports of progress."""
_MODEL_ID = "model"
"""What evalscope calls the model in the names of its files; config.json says which one it is."""

Tell = Callable[..., None]


def run(job: Mapping[str, Any], tell: Tell) -> None:
    """Run ``job`` (``benchmarks/job.py`` says what is in it); ``tell`` takes ``progress`` and ``scores``.

    Raises:
        Exception: what evalscope or a server raised; finished responses are kept in the job's directory.
    """
    os.environ["NLTK_DATA"] = str(Path(job["data_dir"]) / NLTK_FOLDER)  # before nltk is imported
    from megatron_tropd.benchmarks.runner.servers import BalancedServers

    protocol = Protocol.from_json(job["protocol"])
    config = _generation(protocol, job["response_timeout_s"])
    model = BalancedServers(job["urls"], job["model"], job["key"], config)  # one, so that a dead server stays dead
    for name in job["benchmarks"]:
        questions = read_questions(name, Path(job["data_dir"]), protocol)
        work_dir = Path(job["output"]) / "evalscope" / name
        _run_one(job, model, name, questions, protocol, work_dir, tell)
        tell(kind="scores", benchmark=name, rows=_rows(name, questions, protocol, work_dir))


def _run_one(
    job: Mapping[str, Any], model: Any, name: str, questions: Questions, protocol: Protocol, work_dir: Path, tell: Tell
) -> None:
    from evalscope import TaskConfig, run_task

    from megatron_tropd.benchmarks.runner.adapters import Work, register
    from megatron_tropd.benchmarks.runner.grading import CodeGrader

    progress = _Progress(name, len(questions.ids) * protocol.samples[name], tell)
    limits = Limits(cpu_s=protocol.code_timeout_s, wall_s=10 * protocol.code_timeout_s,
                    memory_bytes=protocol.code_memory_mib << 20)  # fmt: skip
    code = CodeGrader(job["code_at_once"], limits)
    known_as = register(Work(name=name, questions=questions, protocol=protocol, code=code, graded=progress.graded))
    for path in work_dir.glob(f"*/{_MODEL_ID}/*.jsonl"):
        progress.done = max(progress.done, _end_at_a_line(path))
    progress.start()
    kept = (work_dir / "configs" / "task_config.yaml").is_file()  # evalscope writes it before the first response
    run_task(
        TaskConfig(
            model=model, model_id=_MODEL_ID, datasets=[known_as], repeats=protocol.samples[name],
            generation_config=model.config, eval_batch_size=job["concurrency"], eval_type="openai_api",
            work_dir=str(work_dir), use_cache=str(work_dir) if kept else None, no_timestamp=True,
            ignore_errors=False, collect_perf=False, judge={"strategy": "rule"},
        )
    )  # fmt: skip


def _generation(protocol: Protocol, timeout_s: float) -> Any:
    """Every value that a server, or a model's generation_config.json, could have a default of its own for; but no seed,
    which would make all samples of a question the same."""
    from evalscope.api.model import GenerateConfig

    sampling = protocol.sampling
    extra: dict[str, Any] = {"top_k": sampling.top_k, "min_p": 0.0, "repetition_penalty": 1.0}
    if protocol.chat_template_arguments:
        extra["chat_template_kwargs"] = dict(protocol.chat_template_arguments)
    return GenerateConfig(
        temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens, presence_penalty=0.0,
        frequency_penalty=0.0, extra_body=extra, stream=False, timeout=timeout_s,
    )  # fmt: skip


def _end_at_a_line(path: Path) -> int:
    """Cut off the line that a killed process did not finish, so that the next one does not continue it; return how many
    lines are left."""
    lines = end = 0
    with path.open("rb+") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def _rows(name: str, questions: Questions, protocol: Protocol, work_dir: Path) -> list[dict[str, Any]]:
    """Return the scores by question from evalscope's reviews.

    Raises:
        RuntimeError: a response has none.
    """
    samples = protocol.samples[name]
    reviews: dict[int, dict[str, Any]] = {}
    for path in work_dir.glob(f"reviews/{_MODEL_ID}/*.jsonl"):
        with path.open(encoding="utf-8") as file:
            for line in file:
                review = json.loads(line)
                reviews[review["index"]] = review["sample_score"]["score"]["metadata"]
    missing = [index for index in range(len(questions.ids) * samples) if index not in reviews]
    if missing:
        raise RuntimeError(f"{name}: {len(missing)} responses have no score; run the command again to go on")
    rows = []
    for number, question in enumerate(questions.ids):
        graded = [reviews[number * samples + sample] for sample in range(samples)]
        rows.append(
            {
                "benchmark": name, "question": question,
                "scores": {m: [g["scores"][m] for g in graded] for m in BENCHMARKS[name].metrics},
                "finish": [g["finish"] for g in graded], "tokens": [g["tokens"] for g in graded],
                "grading_errors": sum(bool(g["error"]) for g in graded),
            }
        )  # fmt: skip
    return rows


class _Progress:
    """Counts graded responses and tells of them, not too often."""

    def __init__(self, name: str, total: int, tell: Tell) -> None:
        self._name, self._total, self._tell = name, total, tell
        self.done = 0
        """Responses graded by an earlier launch, too."""
        self._told = 0.0

    def start(self) -> None:
        """Tell where this launch begins."""
        self._say()

    def graded(self) -> None:
        """Count one; called from many threads, where a lost count only shows late."""
        self.done += 1
        if self.done == self._total or time.monotonic() - self._told > _PROGRESS_S:
            self._say()

    def _say(self) -> None:
        self._told = time.monotonic()
        self._tell(kind="progress", benchmark=self._name, done=min(self.done, self._total), total=self._total)
