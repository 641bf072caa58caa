"""The commands of an experiment, in order: each is one that a user would give, and reads what those before wrote.

published data -> prompts -> supervised finetuning of teacher and student -> the teacher's responses -> TrOPD
-> benchmark of student, trained student and teacher -> comparison and table
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIX = "Please reason step by step, and put your final answer within \\boxed{}."
"""What a prompt asks for; the benchmark's template adds the same."""
PROMPT_LENGTH, RESPONSE_LENGTH = 160, 60
_SMALL = (
    "--apply-chat-template", "--max-prompt-length", PROMPT_LENGTH, "--max-response-length", RESPONSE_LENGTH,
    "--weight-decay", 0.01, "--seed", 0, "--log-interval", 20,
)  # fmt: skip
"""Of every training command: sizes and optimizer of models this small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One command, and where it writes."""

    name: str
    title: str
    words: tuple[str, ...]
    output: Path
    """Exists when the stage is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreters:
    """Pythons of the environments that the stages need."""

    sglang: Path
    evalscope: Path


def stages(out: Path, interpreters: Interpreters, *, steps: int) -> list[Stage]:
    """Return the commands of the experiment below ``out``, whose world is in ``out/world``."""
    return [
        *_data(out),
        _finetuned(out, "teacher", steps=200, rate=5e-3, decay="cosine"),
        _finetuned(out, "student", steps=110, rate=4e-3, decay="constant"),  # before it has learned enough
        _responses(out),
        _distilled(out, steps),
        _benchmark(out, "before", out / "student_sft", interpreters),
        _benchmark(out, "after", out / "tropd", interpreters),
        _benchmark(out, "teacher", out / "teacher_sft", interpreters),
    ]


def _stage(name: str, title: str, output: Path, *words: object) -> Stage:
    return Stage(name=name, title=title, words=tuple(map(str, words)), output=output)


def _data(out: Path) -> list[Stage]:
    prepare = (sys.executable, "tools/prepare_prompts.py", "--prompt-suffix", SUFFIX)
    return [
        _stage(
            "lessons", "Conversations with answers, for finetuning", out / "lessons.jsonl",
            *prepare, "--prompt-data", out / "world/published/chat.jsonl", "--responses",
            "--save", out / "lessons.jsonl",
        ),
        _stage(
            "prompts", "Prompts without duplicates and without the benchmark's questions", out / "prompts",
            *prepare, "--prompt-data", out / "world/published/rl.jsonl", "--require-answer",
            "--decontaminate", out / "world/benchmarks/aime24", "--question-key", "problem", "--save", out / "prompts",
        ),
    ]  # fmt: skip


def _torchrun(ranks: int, run_dir: Path, *words: object) -> tuple[object, ...]:
    run = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks)
    return (*run, "-m", "megatron_tropd.train", "--run-dir", run_dir, *_SMALL, *words)


def _finetuned(out: Path, name: str, *, steps: int, rate: float, decay: str) -> Stage:
    run_dir = out / f"{name}_sft"
    return _stage(
        f"{name}_sft", f"Supervised finetuning of the {name}", run_dir / "hf_export",
        *_torchrun(
            1, run_dir, "--objective", "sft", "--hf-checkpoint", out / "world/base" / name,
            "--prompt-data", out / "lessons.jsonl", "--rollout-batch-size", 32, "--train-iters", steps, "--lr", rate,
            "--save-interval", 0, "--lr-decay-style", decay, "--min-lr", rate / 10 if decay == "cosine" else 0,
        ),
    )  # fmt: skip


def _responses(out: Path) -> Stage:
    return _stage(
        "responses", "The teacher's responses, right ones only", out / "responses/data",
        sys.executable, "-m", "megatron_tropd.generate", "--hf-checkpoint", out / "teacher_sft/hf_export",
        "--prompt-data", out / "prompts", "--apply-chat-template", "--engine", "embedded", "--keep", "right",
        "--max-prompt-length", PROMPT_LENGTH, "--max-response-length", RESPONSE_LENGTH, "--save", out / "responses",
    )  # fmt: skip


def _distilled(out: Path, steps: int) -> Stage:
    return _stage(
        "tropd", "TrOPD on two ranks: the student with TP 2, the teacher with PP 2", out / "tropd/hf_export",
        *_torchrun(
            2, out / "tropd", "--objective", "tropd", "--hf-checkpoint", out / "student_sft/hf_export",
            "--teacher-hf-checkpoint", out / "teacher_sft/hf_export", "--prompt-data", out / "responses/data",
            "--tensor-model-parallel-size", 2, "--teacher-tensor-model-parallel-size", 1,
            "--teacher-pipeline-model-parallel-size", 2, "--make-vocab-size-divisible-by", 8,
            "--rollout-batch-size", 16, "--n-samples-per-prompt", 4, "--train-iters", steps, "--lr", 2e-3,
            "--top-k", 8, "--guidance-beta", 1.0, "--guidance-steps", steps // 2, "--save-interval", 50,
        ),
    )  # fmt: skip


def _benchmark(out: Path, name: str, run_dir: Path, interpreters: Interpreters) -> Stage:
    return _stage(
        f"benchmark_{name}", f"AIME-like questions that nobody has seen: {name}",
        out / "benchmark" / name / "summary.json",
        sys.executable, "-m", "megatron_tropd.benchmark", "--run-dir", run_dir, "--model-name", name,
        "--benchmarks", "aime24", "--samples", "aime24=4", "--data-dir", out / "world/benchmarks",
        "--max-tokens", RESPONSE_LENGTH, "--math-template", "{question}\n" + SUFFIX,
        "--sglang-python", interpreters.sglang, "--evalscope-python", interpreters.evalscope,
        "--sglang-max-total-tokens", 8192, "--output", out / "benchmark" / name,
    )  # fmt: skip


def reports(out: Path) -> list[Sequence[str]]:
    """Return the commands that read the results; they write nothing but what they print."""
    benchmark = (sys.executable, "-m", "megatron_tropd.benchmark")
    names = [str(out / "benchmark" / name) for name in ("before", "after", "teacher")]
    return [(*benchmark, "compare", names[1], names[0]), (*benchmark, "table", *names)]
