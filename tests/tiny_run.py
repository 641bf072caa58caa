"""A whole run in miniature: two random models, a few prompts, and the flags to train on them."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

from megatron_tropd.reports import StepReport
from tests.hf_models import read_tensors, save_hf_checkpoint, write_tensors


def make_world(
    root: Path, *, student: str = "qwen3", teacher: str = "llama", kv_heads: int = 2, student_layers: int = 2
) -> Path:
    """``student/``, ``teacher/`` (two families, one tokenizer), ``train.jsonl`` and ``eval.jsonl``."""
    save_hf_checkpoint(
        root / "student", student, seed=1, num_hidden_layers=student_layers, num_key_value_heads=kv_heads
    )
    save_hf_checkpoint(root / "teacher", teacher, seed=2, num_hidden_layers=4)
    for name in ("student", "teacher"):
        _sharpen(root / name)
    rows = [
        {
            "prompt": " ".join(f"w{3 + (7 * i + j) % 100}" for j in range(2 + i % 4)),
            "response": " ".join(f"w{5 + (3 * i + j) % 90}" for j in range(3 + i % 5)),
            "answer": f"w{i % 9 + 3}",
        }
        for i in range(24)
    ]
    for name, part in (("train", rows), ("eval", rows[:6])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return root


def add_second_teacher(root: Path) -> None:
    """Put another teacher, ``second``, into a world."""
    save_hf_checkpoint(root / "second", "qwen3", seed=9, num_hidden_layers=4)
    _sharpen(root / "second")


def _sharpen(directory: Path) -> None:
    """Larger output weights: distributions that differ.  Nearly uniform ones agree, the loss is then a
    sum that cancels, and a relative comparison of it says nothing."""
    tensors = read_tensors(directory)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        if name in tensors:
            tensors[name] *= 6
    write_tensors(directory, tensors)


def flags(world: Path, directory: Path, /, **changes: Any) -> list[str]:
    """Command-line flags of a run in ``world``; keyword arguments are flags with underscores."""
    settings: dict[str, Any] = {
        "hf_checkpoint": world / "student",
        "teacher_hf_checkpoint": world / "teacher",
        "prompt_data": world / "train.jsonl",
        "run_dir": directory,
        "train_iters": 4,
        "rollout_batch_size": 4,
        "n_samples_per_prompt": 2,
        "max_prompt_length": 8,
        "max_response_length": 12,
        "max_tokens_per_microbatch": 48,
        "top_k": 5,
        "lr": 1e-3,
        "guidance_beta": 0.5,
        "seed": 7,
        "log_interval": 1,
        "answer_pattern": "(w3)",
        "grader": "exact",
    }
    settings.update(changes)
    argv: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            argv.append(flag)
        elif value is not None and value is not False:
            argv += [flag, str(value)]
    return argv


def train_here(argv: list[str], stop_after: int | None = None) -> list[tuple[float, float]]:
    """Train on this rank of a test pool; (loss, gradient norm) of every step."""
    return [(report.loss, report.grad_norm) for report in reports_here(argv, stop_after)]


def reports_here(argv: list[str], stop_after: int | None = None) -> list[StepReport]:
    """Train on this rank of a test pool; the report of every step.

    Everything is what the command does, but for the process group, which the pool owns.
    ``stop_after`` ends the run (after its checkpoint) as an interruption would.
    """
    from megatron_tropd.cli import parse
    from megatron_tropd.setup.assemble import assemble, close
    from megatron_tropd.setup.run_spec import make_run_spec
    from megatron_tropd.training.loop import finish_save, push_weights, save_if_due, train_step

    assembled = assemble(make_run_spec(parse(argv), int(os.environ["WORLD_SIZE"])))
    run, reports = assembled.run, []
    try:
        push_weights(run)
        for step in range(assembled.start_step, run.config.training.train_iters):
            report, _ = train_step(run, step)
            reports.append(report)
            save_if_due(run, report.step)
            if report.step == stop_after:
                break
        finish_save(run, reports[-1].step if reports else assembled.start_step)
    finally:
        close(assembled)
    return reports


def outcome_here(argv: list[str], stop_after: int | None = None) -> tuple[str | None, str, list[int]]:
    """Train on this rank of a test pool; (error or None, what was printed, steps made)."""
    from megatron_tropd.training.guard import BadUpdate

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            reports = reports_here(argv, stop_after)
    except (ValueError, BadUpdate) as error:
        return f"{type(error).__name__}: {error}", printed.getvalue(), []
    return None, printed.getvalue(), [report.step for report in reports]
