"""Training runs on one SGLang server, and the seconds of their steps."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.reporting.records import of_kind, read_records

ROOT = Path(__file__).resolve().parent.parent.parent
_SKIPPED = 2
"""First steps, which warm up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Medians over the steps of a run."""

    step: float
    generate: float
    score: float
    train: float
    push: float
    teacher_wait: float | None
    teacher_busy: float | None
    """Share; None where the teacher is not on ranks of its own."""
    engine_idle: float


def train(world: Path, run_dir: Path, url: str, *, ranks: int, steps: int, flags: list[str]) -> Seconds:
    """Train on ``world`` with the server at ``url``; return the seconds of a step.

    Raises:
        RuntimeError: the run failed; with the end of what it printed.
    """
    words = [
        sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "megatron_tropd.train", "--hf-checkpoint", world / "student", "--teacher-hf-checkpoint",
        world / "teacher", "--prompt-data", world / "train.jsonl", "--run-dir", run_dir, "--train-iters", str(steps),
        "--objective", "tropd", "--guidance", "none", "--top-k", "8", "--rollout-engine", "sglang",
        "--rollout-engine-urls", url, "--update-weight-transport", "shared", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    # Into a file: torch's manager of shared memory holds a pipe open for as long as the server maps the weights.
    printed = run_dir.with_suffix(".log")
    with printed.open("w") as output:
        code = subprocess.run(
            list(map(str, words)), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False,
            timeout=1800,
        ).returncode  # fmt: skip
    if code:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{printed.read_text()[-3000:]}")
    return _medians(run_dir)


def _medians(run_dir: Path) -> Seconds:
    records = list(of_kind(read_records(run_dir / "metrics.jsonl"), "step"))[_SKIPPED:]

    def median(values: list[float]) -> float:
        return statistics.median(values)

    def phase(name: str) -> float:
        return median([record["seconds"].get(name, 0.0) for record in records])

    def metric(name: str) -> float | None:
        values = [record["metrics"][name] for record in records if name in record["metrics"]]
        return median(values) if values else None

    return Seconds(
        step=median([sum(s for name, s in record["seconds"].items() if name != "save") for record in records]),
        generate=phase("generate"), score=phase("score"), train=phase("train"), push=phase("push"),
        teacher_wait=metric("teacher/wait_s"), teacher_busy=metric("teacher/busy_frac"),
        engine_idle=metric("engine/idle_frac") or 0.0,
    )  # fmt: skip
